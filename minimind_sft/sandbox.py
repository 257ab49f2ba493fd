"""Jinja as the ecosystem runs chat templates: sandboxed, with its helpers, and without the rest of the program.

A template is code from a stranger, so it gets Jinja's immutable sandbox. What it may call besides is what everyone
gives it: `tojson` (the caller's), `raise_exception`, `strftime_now`, loop controls, `{% generation %}`. Of the day,
every template is told the same one, in training and in chats: so a run is no other tomorrow, and its cache holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import date
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

BEGIN, END = "\ufdd4\ufdd5"  # around what `{% generation %}` encloses; noncharacters, in no template's source
TODAY = date(2024, 7, 26)  # the day that Llama's templates write where they are told none
_SEARCHES = {"split", "rsplit", "startswith", "endswith", "replace", "find", "rfind", "index", "partition",
             "rpartition", "count", "removeprefix", "removesuffix"}
_STRIPS = {"strip", "lstrip", "rstrip", "trim"}


class _Generation(Extension):
    """`{% generation %}` ... `{% endgeneration %}`: what the template itself calls the assistant's part."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return f"{BEGIN}{caller()}{END}"


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def compile_template(source: str, *, tojson: Callable[..., str]) -> tuple[Callable[..., str], nodes.Template]:
    """A template's render function and its syntax tree.

    Raises:
        ValueError: The source is not Jinja.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": TODAY.strftime,
    }
    try:
        return environment.from_string(source).render, environment.parse(source)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template is not valid Jinja, line {error.lineno}: {error.message}") from None


def looked_at(tree: nodes.Template) -> tuple[set[str], set[str], set[str], set[str]]:
    """What a template's source shows that it looks at.

    Returns:
        The strings that it searches texts for, the characters that it strips off them, what it compares whole texts
        with, and all of its string constants.
    """
    searched: set[str] = set()
    stripped: set[str] = set()
    whole: set[str] = set()
    for compare in tree.find_all(nodes.Compare):
        if any(operand.op in ("in", "notin") for operand in compare.ops):
            searched |= _texts([compare.expr])
        whole |= _texts(compare.find_all(nodes.Const))
    call: Any
    for call in tree.find_all((nodes.Call, nodes.Filter)):
        name = call.name if isinstance(call, nodes.Filter) else getattr(call.node, "attr", None)
        if name in _SEARCHES:
            searched |= _texts(call.args)
        elif name in _STRIPS:
            stripped |= set("".join(_texts(call.args)))
    return searched, stripped, whole, _texts(tree.find_all(nodes.Const))


def _texts(found: Iterable[Any]) -> set[str]:
    """The strings among some nodes."""
    values = [node.value for node in found if isinstance(node, nodes.Const)]
    return {value for value in values if isinstance(value, str) and value}
