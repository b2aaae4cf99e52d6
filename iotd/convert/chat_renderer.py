"""Renders a checkpoint's Jinja chat template as transformers would, in a sandbox: it is code from elsewhere.

Knows the template language and nothing of the pieces it is cut into.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from iotd.errors import CheckpointError


class RefusedError(CheckpointError):
    """The template raised an error on a conversation."""


class Renderer:
    """One template. special_tokens: variables such as `eos_token`. Raises CheckpointError where it does not parse."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise CheckpointError(f"the chat template does not parse: {error}") from error

    def render(self, messages: Sequence[Mapping[str, Any]], thinking: bool = False, generation: bool = False) -> str:
        """The whole conversation as the template writes it. Raises RefusedError where the template raises an error."""
        variables = {
            **self._special_tokens,
            "messages": messages,
            "tools": None,
            "documents": None,
            "add_generation_prompt": generation,
            "enable_thinking": thinking,
        }
        try:
            return self._template.render(variables)
        except CheckpointError:
            raise
        except Exception as error:
            # A template can fail in any of Python's ways, such as adding text to a list.
            raise RefusedError(f"the chat template refuses the roles {_roles(messages)}: {error}") from error

    def around(self, messages: Sequence[Mapping[str, Any]], markers: Sequence[str]) -> list[str]:
        """What the template writes before, between and after the markers, which are the messages' texts in order."""
        rest, pieces = self.render(messages), []
        for marker in markers:
            if rest.count(marker) != 1:
                raise CheckpointError(f"the chat template writes a text of {_roles(messages)} not once and in order")
            piece, _, rest = rest.partition(marker)
            pieces.append(piece)
        return [*pieces, rest]


class _Generation(Extension):
    """`{% generation %}` marks the answers for training; in a prompt it stands for its content."""

    tags = {"generation"}  # noqa: RUF012 - declared so by jinja2

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Without the escapes for HTML that jinja2's own filter makes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(_format: str) -> NoReturn:
    raise CheckpointError("the chat template writes the time of rendering: it cannot be cut once and for all")


def _roles(messages: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(str(message["role"]) for message in messages)
