"""What keeps to a form does so at every place where it may be cut, and what cannot be kept to is refused."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from patience import PATIENCE_S

from iotd.errors import InvalidInput
from iotd.events import FinishReason, Format, Sampling
from iotd.model import Model, State, grammar
from iotd.model.constrained import ConstrainedGeneration
from iotd.model.generation import Said
from iotd.model.grammar import MAX_BYTES, Grammars

MOST = 10_000
GREEDY = Sampling(temperature=0.0, max_tokens=60)
NAMES = st.sampled_from(["room", "on", "t °C", 'a"b'])


def ranges(kind: str) -> st.SearchStrategy[dict[str, Any]]:
    bound = st.integers(-300, 300) if kind == "integer" else st.integers(-3000, 3000).map(lambda tenths: tenths / 10)
    return st.tuples(bound, bound).map(lambda ends: {"type": kind, "minimum": min(ends), "maximum": max(ends)})


LEAVES = st.one_of(
    st.sampled_from(
        [
            {"type": "string"},
            {"type": "string", "minLength": 3, "maxLength": 5},
            {"type": "string", "pattern": "^[a-f]+[0-9]{2}$"},
            {"type": "number"},
            {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
            {"type": "integer", "multipleOf": 7},
            {"type": "boolean"},
            {"type": "null"},
            {"const": "küche"},
            {"enum": ["open", "opened", 3, None, {"a": [1]}]},
        ]
    ),
    ranges("integer"),
    ranges("number"),
)


def nested(parts: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    objects = st.dictionaries(NAMES, parts, min_size=1).flatmap(
        lambda properties: st.sets(st.sampled_from(sorted(properties))).map(
            lambda required: {
                "type": "object",
                "properties": properties,
                "required": sorted(required),
                "additionalProperties": False,
            }
        )
    )
    lists = st.tuples(parts, st.integers(0, 2), st.integers(0, 2)).map(
        lambda a: {"type": "array", "items": a[0], "minItems": a[1], "maxItems": a[1] + a[2]}
    )
    return objects | lists | st.tuples(parts, LEAVES).map(lambda both: {"anyOf": list(both)})


SCHEMAS = st.recursive(LEAVES, nested, max_leaves=5)


def form(kind: Literal["json_schema", "regex", "choices"], *texts: str) -> Format:
    return Format(kind, texts)


def schema(value: Any) -> Format:
    return form("json_schema", json.dumps(value))


@pytest.fixture(scope="module")
def model(tiny_package: Path) -> Model:
    return Model.open(tiny_package, threads=1)


def check(value: Any, text: str) -> None:
    """An independent validator's word."""
    jsonschema.Draft202012Validator(value).validate(json.loads(text))


def begun(model: Model, format: Format, sampling: Sampling, capacity: int = 300) -> ConstrainedGeneration:
    state = model.new_state(capacity)
    logits = model.prefill(state, [7, 8, 9])
    generation = model.generation(state, logits, sampling, constraint=model.constraint(format, sampling.max_tokens))
    assert isinstance(generation, ConstrainedGeneration)
    return generation


def run(generation: ConstrainedGeneration) -> str:
    text = ""
    while not generation.done:
        text += generation.step().answer
    return text + generation.flush().answer


@settings(max_examples=40)
@given(value=SCHEMAS, seed=st.integers(0, 1000))
def test_behind_every_token_a_closing_makes_it_valid(model: Model, value: Any, seed: int) -> None:
    """Tokens are taken at random: of a form, what is seldom is met as often as what is common."""
    constraint, random, said = model.constraint(schema(value), MOST), np.random.default_rng(seed), b""
    for _ in range(40):
        check(value, (said + as_bytes(model, constraint.closing)).decode())
        if constraint.ended:
            break
        tokens = constraint.forced() or [int(random.choice(constraint.allowed()))]
        if tokens[0] in model.spec.eos_token_ids:
            assert constraint.may_end
            break
        assert constraint.take(tokens, MOST)
        said += as_bytes(model, tokens)


def as_bytes(model: Model, tokens: list[int]) -> bytes:
    return b"".join(map(model.tokenizer.token_bytes, tokens))


@settings(max_examples=25)
@given(value=SCHEMAS, seed=st.integers(0, 1000), spare=st.integers(0, 30))
def test_an_answer_is_valid_whatever_its_length(model: Model, value: Any, seed: int, spare: int) -> None:
    """From the shortest that fits, by max_tokens or by the context's end; and it never takes more."""
    form = schema(value)
    max_tokens = len(model.constraint(form, MOST).closing) + spare
    for capacity in (300, 10):
        sampling = Sampling(temperature=1.0, top_k=0, top_p=1.0, seed=seed, max_tokens=max_tokens)
        generation = begun(model, form, sampling, capacity)
        check(value, run(generation))
        assert generation.n_tokens <= max_tokens
        assert generation.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)


@settings(max_examples=25)
@given(value=SCHEMAS, seed=st.integers(0, 1000), n_steps=st.integers(1, 20))
def test_an_answer_is_valid_wherever_it_is_closed(model: Model, value: Any, seed: int, n_steps: int) -> None:
    generation = begun(model, schema(value), Sampling(temperature=1.0, top_k=0, top_p=1.0, seed=seed))
    text = ""
    for _ in range(n_steps):
        if not generation.done:
            text += generation.step().answer
    if not generation.done:
        text += generation.close().answer
    check(value, text + generation.flush().answer)


def test_nothing_is_closed_that_was_not_begun(model: Model) -> None:
    generation = begun(model, schema({"type": "object", "properties": {"a": {}}, "required": ["a"]}), GREEDY)
    assert generation.close() == generation.flush() == Said()


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000), max_tokens=st.integers(12, 40))
@pytest.mark.parametrize("pattern", ["[0-9]{4}-[0-9]{2}", "(ab)*c", "[a-z]*Q", ".*end", "x|y+|", "[à-ü]{2,5}°"])
def test_a_regular_expression_matches_the_whole_answer(model: Model, pattern: str, seed: int, max_tokens: int) -> None:
    sampling = Sampling(temperature=1.0, top_k=0, top_p=1.0, seed=seed, max_tokens=max_tokens)
    text = run(begun(model, form("regex", pattern), sampling))
    assert re.fullmatch(pattern, text, re.DOTALL)


@settings(max_examples=40)
@given(choices=st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=5, unique=True), seed=st.integers(0, 99))
def test_one_of_the_choices_is_the_answer(model: Model, choices: list[str], seed: int) -> None:
    """Whatever stands in them: quotes, line breaks, characters that the tokenizer would normalise."""
    try:
        "".join(choices).encode()
    except UnicodeEncodeError:
        return
    for most in (1, 100):
        generation = begun(model, form("choices", *choices), Sampling(temperature=1.0, top_k=0, seed=seed))
        text = generation.step().answer
        while not generation.done and generation.n_tokens < most:
            text += generation.step().answer
        if not generation.done:
            text += generation.close().answer
        assert text + generation.flush().answer in choices


def test_no_choice_is_cut_for_another(model: Model) -> None:
    """With room for the shorter one alone, the model could not have chosen."""
    with pytest.raises(InvalidInput, match="an answer takes 13 tokens, and max_tokens is 12") as caught:
        model.constraint(form("choices", "no", "nobodyishere!"), 12)
    assert caught.value.field == "choices"


@pytest.mark.parametrize("low,high", [(18, 24), (-5, 105), (0.25, 0.5), (-273.15, -12)])
def test_numbers_stay_in_their_range(model: Model, low: float, high: float) -> None:
    kind = "integer" if isinstance(low, int) else "number"
    value = {"type": kind, "minimum": low, "maximum": high}
    for seed in range(40):
        text = run(begun(model, schema(value), Sampling(temperature=1.0, top_k=0, seed=seed, max_tokens=8)))
        assert low <= json.loads(text) <= high


ROOM = {
    "type": "object",
    "properties": {"temperature": {"type": "integer", "minimum": 10, "maximum": 39}, "state": {"enum": ["on", "off"]}},
    "required": ["temperature", "state"],
    "additionalProperties": False,
}


def test_what_is_forced_is_read_in_one_run(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two digits and one letter are chosen: three runs, and the last of them ends the answer."""
    runs: list[int] = []
    run_decoder = model._decoder._run

    def counted(state: State, positions: Any, n_rows: int) -> None:
        runs.append(positions.shape[1])
        run_decoder(state, positions, n_rows)

    generation = begun(model, schema(ROOM), GREEDY)
    monkeypatch.setattr(model._decoder, "_run", counted)
    text = run(generation)
    assert re.fullmatch(r'\{"temperature": [123]\d, "state": "(on|off)"\}', text)
    assert [len('{"temperature": '), 1, len('x, "state": "o')] == runs
    assert generation.n_tokens == len(text)
    assert generation.finish_reason is FinishReason.STOP


def test_what_leaves_no_choice_takes_no_run(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    generation = begun(model, form("choices", "only this"), GREEDY)
    monkeypatch.setattr(model._decoder, "_run", None)
    assert run(generation) == "only this"


@pytest.mark.parametrize("value", [ROOM, {"type": "array", "items": {"type": "string", "pattern": "^[xyz]{2,6}$"}}])
def test_it_is_what_the_model_would_have_drawn_token_by_token(model: Model, value: Any) -> None:
    """Greedy, each token the likeliest that is allowed. So it is where tokens are bytes, as here: where a model could
    spell a forced text in other tokens, it is read in the tokenizer's."""
    constraint = model.constraint(schema(value), MOST)
    state = model.new_state(300)
    logits = model.prefill(state, [7, 8, 9])
    drawn: list[int] = []
    while len(drawn) < GREEDY.max_tokens and not constraint.ended:
        masked = np.full_like(logits, -np.inf)
        masked[constraint.allowed()] = logits[constraint.allowed()]
        token = int(masked.argmax())
        if token in model.spec.eos_token_ids or not constraint.take([token], GREEDY.max_tokens - len(drawn) - 1):
            drawn += constraint.closing
            break
        drawn.append(token)
        logits = model.step(state, token).copy()
    assert run(begun(model, schema(value), GREEDY)) == as_bytes(model, drawn).decode()


def test_control_tokens_are_never_allowed_in_text_and_the_end_only_where_it_may_be(model: Model) -> None:
    constraint = model.constraint(schema({"type": "string"}), MOST)
    assert constraint.forced() == model.tokenizer.encode('"')
    constraint.take(model.tokenizer.encode('"'), MOST)
    assert not set(model.tokenizer.control_ids) & set(constraint.allowed().tolist())
    number = model.constraint(schema({"type": "integer", "minimum": 1, "maximum": 20}), MOST)
    number.take(model.tokenizer.encode("1"), MOST)
    assert set(model.spec.eos_token_ids) <= set(number.allowed().tolist())


def test_few_allowed_tokens_are_told_and_many_are_not(model: Model) -> None:
    constraint = model.constraint(form("choices", "a", "b"), MOST)
    found = constraint.allowed_ids(2)
    assert found is not None
    assert found.tolist() == model.tokenizer.encode("a") + model.tokenizer.encode("b")
    assert constraint.allowed_ids(1) is None


def test_what_has_no_room_is_not_taken(model: Model) -> None:
    constraint = model.constraint(schema({"anyOf": [{"type": "null"}, {"type": "string", "minLength": 20}]}), MOST)
    quote = model.tokenizer.encode('"')
    before = constraint.closing
    assert not constraint.take(quote, 20)
    assert constraint.closing == before
    assert constraint.take(quote, 21)


def test_a_name_has_one_spelling(model: Model) -> None:
    """Spelled otherwise it would be another property's, of which the schema says nothing."""
    constraint = model.constraint(schema({"type": "object", "properties": {"a": {"type": "integer"}}}), MOST)
    assert constraint.take(model.tokenizer.encode('{"'), MOST)
    assert constraint.take(model.tokenizer.encode("\\"), MOST)
    escapes = as_bytes(model, [token for token in constraint.allowed().tolist() if token < 256])
    assert sorted(escapes) == sorted(b'"\\bfnrt')


def test_a_schema_does_not_say_how_json_is_written(model: Model) -> None:
    value = {
        "type": "array",
        "items": {"const": 1},
        "minItems": 2,
        "maxItems": 2,
        "x-guidance": {"item_separator": "; "},
    }
    assert run(begun(model, schema(value), GREEDY)) == "[1, 1]"


RECURSIVE = {"type": "object", "properties": {"c": {"$ref": "#"}}, "required": ["c"]}


@pytest.mark.parametrize(
    ("format", "field", "message"),
    [
        (form("json_schema", "{"), "json_schema", "Expecting property name"),
        (form("json_schema", "[" * 8000), "json_schema", "recursion"),
        (form("json_schema", "3"), "json_schema", "object"),
        (form("json_schema", '{"multipleOf": NaN}'), "json_schema", "expected"),
        (schema({"type": "foo"}), "json_schema", "Invalid type: foo"),
        (schema({"not": {}}), "json_schema", "Unimplemented keys"),
        (schema({"not": {}, "x-guidance": {"lenient": True}}), "json_schema", "Unimplemented keys"),
        (schema({"oneOf": [{"type": "number"}, {"type": "integer"}]}), "json_schema", "oneOf"),
        (schema({"$ref": "http://127.0.0.1:9/x"}), "json_schema", "not present"),
        (schema({"type": "integer", "minimum": 3, "maximum": 2}), "json_schema", "Unsatisfiable"),
        (schema({"multipleOf": 1000003}), "json_schema", "multipleOf"),
        (schema({"allOf": [{"multipleOf": 997}, {"multipleOf": 9.91}]}), "json_schema", "multipleOf"),
        (schema({"type": "object", "minProperties": 2}), "json_schema", "minProperties"),
        (schema({"enum": ["a", {"b": "\x01"}]}), "json_schema", "control characters"),
        (schema(RECURSIVE), "json_schema", "no answer was found"),
        (schema({"type": "string", "minLength": 100_000}), "json_schema", "no answer was found"),
        (schema({"type": "string", "minLength": 99}), "json_schema", "takes 101 tokens, and max_tokens is 60"),
        (schema({"description": "x" * MAX_BYTES}), "json_schema", "at most 16384"),
        (form("regex", "(ab"), "regex", "unclosed group"),
        (form("regex", "(?=a)b"), "regex", "look-around"),
        (form("regex", r"(a)\1"), "regex", "backreferences"),
        (form("regex", r"[^\s\S]"), "regex", "no answer was found"),
        (form("regex", "(" * 2000 + ")" * 2000), "regex", "nested parentheses"),
        (form("choices"), "choices", "0 given"),
        (form("choices", *map(str, range(300))), "choices", "300 given"),
        (form("choices", "a", "b", ""), "choices[2]", "is empty"),
        (form("choices", "a", "b", "a"), "choices[2]", "twice"),
    ],
)
def test_what_cannot_be_kept_to_is_refused(model: Model, format: Format, field: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=re.escape(message)) as caught:
        model.constraint(format, 60)
    assert caught.value.field == field
    assert str(caught.value).startswith(field.partition("[")[0])


def test_a_form_that_met_a_limit_is_compiled_anew(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers share what the lexer has learnt, up to a limit: who meets it is closed, and the next begins afresh."""
    monkeypatch.setattr(grammar, "MAX_LEXER_STATES", 300)
    format, full = form("regex", "[ab]*a[ab]{9}c"), 0
    for seed in range(40):
        generation = begun(model, format, Sampling(temperature=1.0, top_k=0, top_p=1.0, seed=seed, max_tokens=40))
        text = run(generation)
        assert re.fullmatch("[ab]*a[ab]{9}c", text)
        full += generation.n_tokens == 40 or generation.finish_reason is FinishReason.STOP
    assert 30 <= full < 40


def test_a_form_is_compiled_once(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    model.constraint(schema(ROOM), MOST)
    monkeypatch.setattr(Grammars, "_vocabulary", None)
    first, second = (model.constraint(schema(ROOM), MOST) for _ in range(2))
    first.take(first.forced(), MOST)
    assert second.forced()[:1] == model.tokenizer.encode("{")


def test_llguidance_is_imported_by_the_first_form_and_not_before(tiny_package: Path) -> None:
    code = """if True:
        import sys
        import iotd.app
        from iotd.events import Format
        from iotd.model import Model
        model = Model.open(sys.argv[1], threads=1)
        assert "".join(model.generate([{"role": "user", "content": "hi"}], max_tokens=2, seed=0))
        assert "llguidance" not in sys.modules
        model.constraint(Format("choices", ("a",)), 9)
        assert "llguidance" in sys.modules
    """
    subprocess.run([sys.executable, "-c", code, str(tiny_package)], check=True, timeout=PATIENCE_S)
