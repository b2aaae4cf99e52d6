"""A checkpoint's chat template as plain pieces of text, and conversations rendered with them.

The pieces are cut once, at conversion, so nothing here knows a template language. What the template writes may contain
control tokens; what a user or a sensor wrote is data and never does.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from iotd.errors import InvalidInput, PackageError
from iotd.model.oddities import oddities
from iotd.model.tokenizer import Tokenizer

Message = Mapping[str, Any]
"""`{"role": "user", "content": "text"}`, or as content a list of `{"type": "text", "text": …}` and
`{"type": "image", "image": …}`."""


@dataclass(frozen=True, slots=True)
class TemplateText:
    """Written by the template: control tokens in it are meant."""

    text: str


@dataclass(frozen=True, slots=True)
class UserText:
    """Written by someone else: control tokens in it are characters."""

    text: str


@dataclass(frozen=True, slots=True, eq=False)
class ImageSlot:
    """Where an image's embeddings stand."""

    image: Any
    """What the message carried: for a model, uint8 [H, W, 3]."""


Segment = TemplateText | UserText | ImageSlot


@dataclass(frozen=True, slots=True)
class Turn:
    """What the template writes around one message's text."""

    before: str
    after: str
    trim: bool = False
    """White space at both ends of the message is taken off."""


@dataclass(frozen=True, slots=True)
class ImagePieces:
    """What the template writes around an image, and the token it repeats once for each embedding."""

    before: str
    pad: str
    after: str


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """How a conversation is written for this model."""

    no_system: str
    """Stands first where the conversation brings no system message."""
    system: Turn | None
    """None where the template takes no system message."""
    user: Turn
    assistant: Turn
    """An answer with a user's turn after it."""
    last_assistant: Turn
    """An answer that no user's turn follows."""
    generation: str
    """Opens the answer to come, with thinking off."""
    generation_thinking: str
    image: ImagePieces | None
    """None where the template takes no images."""
    thinking_end: str = ""
    """Earlier answers lose everything up to the last of these; empty where the template keeps it."""
    refused: tuple[str, ...] = ()
    """Of `iotd.model.oddities`, what the template writes in a way that these pieces cannot say."""

    def to_json(self) -> bytes:
        """A file's content, from which `from_json` makes the same again."""
        return json.dumps(asdict(self), indent=1).encode()

    @classmethod
    def from_json(cls, text: bytes) -> "ChatTemplate":
        """What `to_json` gave. Raises PackageError on anything else."""
        try:
            data = json.loads(text)
            turns = {name: Turn(**data[name]) for name in ("user", "assistant", "last_assistant")}
            system = data["system"] and Turn(**data["system"])
            image = data["image"] and ImagePieces(**data["image"])
            refused = tuple(data.get("refused", ()))
            return cls(**{**data, **turns, "system": system, "image": image, "refused": refused})
        except (KeyError, TypeError, ValueError) as error:
            raise PackageError(f"the package's chat template is damaged: {error}") from error

    def render(
        self, messages: Sequence[Message], thinking: bool = False, add_generation_prompt: bool = True
    ) -> list[Segment]:
        """A conversation as segments. Raises InvalidInput naming the part, such as `messages[1].role`."""
        roles, contents = _read(messages)
        if "user" not in roles:
            raise InvalidInput("a conversation needs a message of the user", field="messages")
        self._check(roles, contents)
        last_user = len(roles) - 1 - roles[::-1].index("user")
        segments: list[Segment] = [] if roles[0] == "system" else [TemplateText(self.no_system)]
        for i, role in enumerate(roles):
            turn = self._turn(role, i, i > last_user)
            content = _trimmed(contents[i]) if turn.trim else contents[i]
            if role == "assistant":
                content = self._without_thinking(content, i, i > last_user)
            segments += self._written(turn, content, i, images=role == "user")
        if add_generation_prompt:
            segments.append(TemplateText(self._generation(thinking)))
        return _joined(segments)

    def open_stream(self, system: str = "") -> list[Segment]:
        """The start of a conversation up to and into the user's turn, which stays open.

        What follows may be tokenised piece by piece, with the ids of the whole, if each piece ends with a line break
        and starts with something else than white space.
        """
        start: list[Segment] = [TemplateText(self.no_system)]
        if system:
            turn = self._turn("system", 0, False)
            self._check(["system"], [[system]])
            start = self._written(turn, _trimmed([system]) if turn.trim else [system], 0, images=False)
        return _joined([*start, TemplateText(self.user.before)])

    def next_turn(self) -> list[Segment]:
        """Behind an answer: its end, and the beginning of another user's turn."""
        return [TemplateText(self.assistant.after + self.user.before)]

    def close_turn(self, thinking: bool = False) -> list[Segment]:
        """The end of the open user's turn, and the opening of the answer."""
        return [TemplateText(self.user.after + self._generation(thinking))]

    @property
    def thought_end(self) -> str:
        """Stands between thoughts and answer; empty where the template does not let the model think.

        With thinking off, the template itself writes it behind the thoughts that it has opened.
        """
        if self.generation.startswith(self.generation_thinking):
            return self.generation.removeprefix(self.generation_thinking)
        return self.thinking_end

    def image_segments(self, image: Any) -> list[Segment]:
        """One image within a user's turn. Raises InvalidInput where the template takes none."""
        if self.image is None:
            raise InvalidInput("this model takes no images", field="images")
        return [TemplateText(self.image.before), ImageSlot(image), TemplateText(self.image.after)]

    def tokenize(self, segments: Iterable[Segment], tokenizer: Tokenizer) -> list[list[int] | Any]:
        """Runs of token ids, and between them the images as the messages carried them.

        Template and user text between two control tokens are tokenised as one text: the ids are those of the whole
        conversation rendered to one string, wherever users wrote no control tokens.
        """
        runs: list[list[int] | Any] = []
        parts: list[tuple[str, bool]] = []
        for segment in segments:
            if isinstance(segment, ImageSlot):
                runs += [tokenizer.encode_parts(parts), segment.image]
                parts = []
            else:
                parts.append((segment.text, isinstance(segment, TemplateText)))
        runs.append(tokenizer.encode_parts(parts))
        return [run for run in runs if not (isinstance(run, list) and not run)]

    def _check(self, roles: Sequence[str], contents: Sequence[Sequence[Any]]) -> None:
        """Raises InvalidInput for a conversation that the pieces cannot say."""
        for oddity, i in oddities(roles, contents) if self.refused else ():
            if oddity in self.refused:
                raise InvalidInput(
                    f"this model's chat template has a way of its own with {oddity}: do without", field=f"messages[{i}]"
                )

    def _generation(self, thinking: bool) -> str:
        return self.generation_thinking if thinking else self.generation

    def _turn(self, role: str, i: int, after_last_user: bool) -> Turn:
        if role == "user":
            return self.user
        if role == "assistant":
            return self.last_assistant if after_last_user else self.assistant
        if self.system is None:
            raise InvalidInput("this model takes no system message", field=f"messages[{i}].role")
        return self.system

    def _without_thinking(self, content: list[Any], i: int, after_last_user: bool) -> list[Any]:
        if not self.thinking_end or not any(isinstance(part, str) and self.thinking_end in part for part in content):
            return content
        if after_last_user:
            raise InvalidInput("the last answer may not contain thinking", field=f"messages[{i}].content")
        return [part.split(self.thinking_end)[-1].lstrip("\n") if isinstance(part, str) else part for part in content]

    def _written(self, turn: Turn, content: list[Any], i: int, images: bool) -> list[Segment]:
        segments: list[Segment] = [TemplateText(turn.before)]
        for part in content:
            if isinstance(part, str):
                segments.append(UserText(part))
            elif images and self.image is not None:
                segments += self.image_segments(part.image)
            else:
                why = "only a user's message may contain images" if self.image else "this model takes no images"
                raise InvalidInput(why, field=f"messages[{i}].content")
        return [*segments, TemplateText(turn.after)]


def odd(messages: Sequence[Message]) -> set[str]:
    """What is odd about a conversation, of `iotd.model.oddities`. Raises InvalidInput where it is none."""
    return {oddity for oddity, _ in oddities(*_read(messages))}


def _read(messages: Sequence[Message]) -> tuple[list[str], list[list[Any]]]:
    """Roles and contents of all messages."""
    return [_role(messages, i) for i in range(len(messages))], [_content(each, i) for i, each in enumerate(messages)]


def _role(messages: Sequence[Message], i: int) -> str:
    message = messages[i]
    role = message.get("role") if isinstance(message, Mapping) else message
    if role not in ("system", "user", "assistant"):
        raise InvalidInput(f"the role {role!r} is none of system, user, assistant", field=f"messages[{i}].role")
    if role == "system" and i > 0:
        raise InvalidInput("a system message may only stand first", field=f"messages[{i}].role")
    return str(role)


def _content(message: Message, i: int) -> list[Any]:
    """The message's content as strings and ImageSlots, neighbouring strings joined."""
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list | tuple):
        raise InvalidInput("content has to be text, or a list of parts", field=f"messages[{i}].content")
    parts: list[Any] = []
    for j, part in enumerate(content):
        found = _part(part, f"messages[{i}].content[{j}]")
        if isinstance(found, str) and parts and isinstance(parts[-1], str):
            parts[-1] += found
        else:
            parts.append(found)
    return parts


def _part(part: Any, field: str) -> str | ImageSlot:
    match part:
        case {"type": "text", "text": str(text)}:
            return text
        case {"type": "image", "image": image}:
            return ImageSlot(image)
        case _:
            raise InvalidInput("a part has the type text with `text`, or image with `image`", field=field)


_Part = TypeVar("_Part")


def _trimmed(parts: list[_Part]) -> list[_Part | str]:
    """Without white space at both ends, up to the first image."""
    kept: list[_Part | str] = list(parts)
    while kept and isinstance(kept[0], str):
        kept[0] = kept[0].lstrip()
        if kept[0]:
            break
        kept.pop(0)
    while kept and isinstance(kept[-1], str):
        kept[-1] = kept[-1].rstrip()
        if kept[-1]:
            break
        kept.pop()
    return kept


def _joined(segments: Iterable[Segment]) -> list[Segment]:
    """Neighbours of one kind as one, and empty ones left out."""
    joined: list[Segment] = []
    for segment in segments:
        last = joined[-1] if joined else None
        if isinstance(segment, ImageSlot):
            joined.append(segment)
        elif isinstance(last, TemplateText) and isinstance(segment, TemplateText):
            joined[-1] = TemplateText(last.text + segment.text)
        elif segment.text:
            joined.append(segment)
    return joined
