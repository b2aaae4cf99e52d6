"""A checkpoint's Jinja chat template to the plain pieces of `iotd.model.chat`.

The template is rendered around marker texts, in a sandbox, and cut at them; then the pieces have to reproduce what the
template makes of whole conversations. Of odd ones, which the daemon does not need, those are refused that they cannot.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from iotd.convert.chat_renderer import RefusedError, Renderer
from iotd.convert.checkpoint import read_json
from iotd.errors import CheckpointError
from iotd.model.chat import ChatTemplate, ImagePieces, ImageSlot, Segment, Turn, odd
from iotd.model.oddities import ODDITIES

IMAGE_PAD = "<|image_pad|>"

CHATML = ChatTemplate(
    no_system="",
    system=Turn("<|im_start|>system\n", "<|im_end|>\n", trim=True),
    user=Turn("<|im_start|>user\n", "<|im_end|>\n", trim=True),
    assistant=Turn("<|im_start|>assistant\n", "<|im_end|>\n", trim=True),
    last_assistant=Turn("<|im_start|>assistant\n<think>\n\n</think>\n\n", "<|im_end|>\n", trim=True),
    generation="<|im_start|>assistant\n<think>\n\n</think>\n\n",
    generation_thinking="<|im_start|>assistant\n<think>\n",
    image=ImagePieces("<|vision_start|>", IMAGE_PAD, "<|vision_end|>"),
    thinking_end="</think>",
)
"""What Qwen3.5 writes, for a checkpoint that brings no template."""

_SYSTEM, _USER, _ANSWER, _NEXT = "iotdSystemText", "iotdUserText", "iotdAnswerText", "iotdNextText"
_BLANK = " \n\t "


def compile_chat(checkpoint: Path | None, image_pad: str = IMAGE_PAD) -> ChatTemplate:
    """The pieces of a checkpoint's chat template; CHATML where it brings none.

    image_pad: the text of the token that config.json names as `image_token_id`. Raises CheckpointError where the
    template cannot be read, cannot be cut into pieces, or means something else than its pieces say; but for odd
    conversations, which the pieces then name as `refused`.
    """
    source = _source(checkpoint) if checkpoint else None
    if checkpoint is None or source is None:
        return CHATML
    renderer = Renderer(source, _special_tokens(checkpoint))
    chat = _cut(renderer, image_pad)
    return replace(chat, refused=_verify(renderer, chat))


def _source(checkpoint: Path) -> str | None:
    """The template's text, from the first of the places where transformers puts it."""
    if (path := checkpoint / "chat_template.jinja").exists():
        try:
            return path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"cannot read {path}: {error}") from error
    for name in ("chat_template.json", "tokenizer_config.json"):
        if not (checkpoint / name).exists():
            continue
        found = read_json(checkpoint / name).get("chat_template")
        if isinstance(found, list):
            found = {entry["name"]: entry["template"] for entry in found}.get("default")
        if found:
            return str(found)
    return None


def _special_tokens(checkpoint: Path) -> dict[str, str]:
    """`bos_token` and its like, which transformers hands to the template."""
    path = checkpoint / "tokenizer_config.json"
    config = read_json(path) if path.exists() else {}
    tokens = {}
    for name in ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"):
        found = config.get(name)
        content = found.get("content") if isinstance(found, Mapping) else found
        if isinstance(content, str):
            tokens[name] = content
    return tokens


def _cut(renderer: Renderer, image_pad: str) -> ChatTemplate:
    first, to_answer, to_next, user_after = renderer.around(
        [_user(_USER), _assistant(_ANSWER), _user(_NEXT)], [_USER, _ANSWER, _NEXT]
    )
    last_answer = _last_answer(renderer, user_after)
    user_before = _user_before(first, to_next, last_answer.after if last_answer else "")
    answer_after = _ahead(to_next, user_before, "a user's turn")
    generation, generation_thinking = (_generation(renderer, thinking) for thinking in (False, True))
    padded = _BLANK + _ANSWER + _BLANK
    history = [_user(_BLANK + _USER + _BLANK), _assistant(padded), _user(_NEXT)]
    assistant = Turn(
        _behind(user_after, to_answer, "a user's turn"), answer_after, padded not in renderer.render(history)
    )
    return ChatTemplate(
        no_system=_ahead(first, user_before, "a user's turn"),
        system=_system(renderer, user_before),
        user=Turn(user_before, user_after, _BLANK + _USER not in renderer.render(history)),
        assistant=assistant,
        last_assistant=last_answer or assistant,
        generation=generation,
        generation_thinking=generation_thinking,
        image=_image(renderer, image_pad),
        thinking_end=_thinking_end(renderer),
    )


def _last_answer(renderer: Renderer, user_after: str) -> Turn | None:
    """An answer that nothing follows; None where the template refuses one."""
    padded = _BLANK + _ANSWER + _BLANK
    try:
        _, before, after = renderer.around([_user(_USER), _assistant(_ANSWER)], [_USER, _ANSWER])
        trim = padded not in renderer.render([_user(_USER), _assistant(padded)])
    except RefusedError:
        return None
    return Turn(_behind(user_after, before, "a user's turn"), after, trim)


def _user_before(first: str, to_next: str, last_after: str) -> str:
    """What opens a user's turn, of what stands before the first one and between an answer and the next."""
    opened = to_next.removeprefix(last_after)
    if last_after and opened != to_next and first.endswith(opened):
        return opened
    shared = takewhile(lambda pair: pair[0] == pair[1], zip(reversed(first), reversed(to_next), strict=False))
    return to_next[len(to_next) - len(list(shared)) :]


def _system(renderer: Renderer, user_before: str) -> Turn | None:
    try:
        before, to_user, _ = renderer.around([_message("system", _SYSTEM), _user(_USER)], [_SYSTEM, _USER])
    except RefusedError:
        return None
    padded = _BLANK + _SYSTEM + _BLANK
    trim = padded not in renderer.render([_message("system", padded), _user(_USER)])
    return Turn(before, _ahead(to_user, user_before, "a user's turn"), trim)


def _generation(renderer: Renderer, thinking: bool) -> str:
    messages = [_user(_USER)]
    without = renderer.render(messages, thinking)
    return _behind(without, renderer.render(messages, thinking, generation=True), "a conversation")


def _image(renderer: Renderer, image_pad: str) -> ImagePieces | None:
    try:
        rendered = renderer.render([_user([_text(_USER), _IMAGE, _text(_NEXT)])])
    except RefusedError:
        return None
    between = rendered.partition(_USER)[2].partition(_NEXT)[0]
    if between.count(image_pad) != 1:
        return None
    before, _, after = between.partition(image_pad)
    return ImagePieces(before, image_pad, after)


def _thinking_end(renderer: Renderer) -> str:
    thinking = f"<think>\n{_SYSTEM}\n</think>\n\n{_ANSWER}"
    rendered = renderer.render([_user(_USER), _assistant(thinking), _user(_NEXT)])
    return "" if _SYSTEM in rendered else "</think>"


def _behind(known: str, text: str, what: str) -> str:
    if not text.startswith(known):
        raise CheckpointError(f"the chat template writes {what} in more than one way: {known!r} and {text!r}")
    return text.removeprefix(known)


def _ahead(text: str, known: str, what: str) -> str:
    if not text.endswith(known):
        raise CheckpointError(f"the chat template writes {what} in more than one way: {known!r} and {text!r}")
    return text.removesuffix(known)


def _message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def _user(content: Any) -> dict[str, Any]:
    return _message("user", content)


def _assistant(content: Any) -> dict[str, Any]:
    return _message("assistant", content)


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


_IMAGE = {"type": "image", "image": ""}

_SHOWN = _message("system", "Be brief.\nBe exact.")
_ASKED = _user("Is the door\n\nopen?")
_ANSWERED = _assistant("It is closed.\nSince 14:03.")
_AGAIN = _user("And now?")
_BE_BRIEF, _ASK, _NO = _message("system", "\n Be brief. \n"), _user("\t Open?\u00a0\n"), _assistant("\n\n No. \n")

# What is odd stands alone before it stands among others, so that it is known what a template does not write as usual.
_CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one question": [_ASKED],
    "a system message": [_SHOWN, _ASKED],
    "several turns": [_SHOWN, _ASKED, _ANSWERED, _AGAIN, _assistant("Open."), _user("Sure?")],
    "several turns without a system message": [_ASKED, _ANSWERED, _AGAIN],
    "text in parts": [_user([_text("Is the "), _text("door open?")])],
    "an image first": [_SHOWN, _user([_IMAGE, _text("Who is there?")])],
    "an image last": [_user([_text("Who is there? "), _IMAGE])],
    "two images in two turns": [
        _user([_text("Before "), _IMAGE, _text(" and "), _IMAGE]),
        _ANSWERED,
        _user([_IMAGE, _text("now")]),
    ],
    "an empty system message": [_message("system", ""), _ASKED],
    "an empty question": [_user(""), _ANSWERED, _user("")],
    "an empty answer": [_ASKED, _assistant(""), _AGAIN],
    "white space around a system message": [_BE_BRIEF, _ASKED],
    "white space around a question": [_ASK, _ANSWERED, _ASK],
    "white space around an answer": [_ASKED, _NO, _AGAIN],
    "white space around text in parts": [_user([_text(" Is the "), _text("door open? ")])],
    "white space around a question with an image": [_user([_IMAGE, _text(" Who is there? ")])],
    "an image between blanks": [_user([_text(" \n"), _IMAGE, _text("\n ")])],
    "an answer at the end": [_ASKED, _ANSWERED],
    "two questions in a row": [_ASKED, _user("And the window?")],
    "two answers in a row": [_ASKED, _ANSWERED, _assistant("Still closed."), _AGAIN],
    "two answers at the end": [_ASKED, _ANSWERED, _assistant("Still closed.")],
    "thinking in an earlier answer": [_ASKED, _assistant("<think>\nHm.\n</think>\n\nNo."), _AGAIN],
    "blanks behind thinking": [_ASKED, _assistant("<think>\nHm.\n</think>\n \n  No. \n"), _AGAIN],
    "white space around every text": [_BE_BRIEF, _ASK, _NO, _user(" \n "), _assistant("  What? \n")],
    "empty texts": [_message("system", ""), _user(""), _assistant(""), _user("")],
}


def _verify(renderer: Renderer, chat: ChatTemplate) -> tuple[str, ...]:
    """What is odd and not written as the pieces say. Raises CheckpointError for what is not odd."""
    refused: set[str] = set()
    for name, messages in _CONVERSATIONS.items():
        oddities = odd(messages)
        if not _within_reach(chat, messages) or oddities & refused:
            continue
        if difference := _difference(renderer, chat, messages):
            if not oddities:
                raise CheckpointError(f"the chat template cannot be cut into pieces: of {name} {difference}")
            refused.add(next(oddity for oddity in ODDITIES if oddity in oddities))
    return tuple(sorted(refused))


def _difference(renderer: Renderer, chat: ChatTemplate, messages: list[dict[str, Any]]) -> str:
    """Between what the template makes of a conversation, and its pieces; empty where there is none."""
    for thinking, generation in ((False, True), (True, True), (False, False)):
        try:
            wanted = renderer.render(messages, thinking, generation)
        except RefusedError as error:
            return f"it makes nothing: {error}"
        made = _as_text(chat.render(messages, thinking, generation), chat)
        if made != wanted:
            return f"(thinking {'on' if thinking else 'off'}) it makes {wanted!r}, its pieces make {made!r}"
    return ""


def _within_reach(chat: ChatTemplate, messages: Sequence[Mapping[str, Any]]) -> bool:
    """A template without system messages or images is not asked for them."""
    if chat.system is None and messages[0]["role"] == "system":
        return False
    return chat.image is not None or all(isinstance(message["content"], str) for message in messages)


def _as_text(segments: Sequence[Segment], chat: ChatTemplate) -> str:
    pad = chat.image.pad if chat.image else ""
    return "".join(pad if isinstance(segment, ImageSlot) else segment.text for segment in segments)
