"""YAML as people mean it: what YAML 1.1 would lose or read as another value is refused with its line.

    parse_yaml("training: {log_every: 3}", "my.yaml")
    parse_scalar("1_000")                                     # 1000; "2026-01-01" is a text

Refused are keys that occur twice in a mapping (the first would be lost), keys that are no texts, numbers with a
leading zero (``010`` is 8), numbers with colons (``1:30`` is 90), infinities, NaN, tags, several documents, and
documents that are too deep or that aliases make too large. In quotes the numbers are texts; dates are texts anyway.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import yaml
from yaml.constructor import ConstructorError
from yaml.reader import ReaderError

from data_shards.credentials import hide_credentials
from launcher.config.settings import SettingsError

MAX_DEPTH = 50
MAX_VALUES = 100_000  # with what aliases repeat
MAX_INTEGER = 2**63 - 1
_OCTAL = re.compile(r"[-+]?0[0-9_]+")
_SEXAGESIMAL = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")
_NO_TEXT = re.compile("[\0\ud800-\udfff]")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|nan)", re.IGNORECASE)
_TAG = "tag:yaml.org,2002:"
_TAGS = (f"{_TAG}str", f"{_TAG}int", f"{_TAG}float")  # which a text may name
_NO_TYPES = (f"{_TAG}timestamp", f"{_TAG}value")  # of YAML's; here such values are texts


def parse_yaml(text: str, place: str, *, with_line: bool = True) -> Any:
    """Parse a YAML document.

    Args:
        place: where it is, for messages: a file, or a setting.
        with_line: whether messages also name the line.

    Raises:
        SettingsError: it is no valid YAML, or holds what is refused.
    """

    def refusal(problem: str, line: int) -> SettingsError:
        return SettingsError(
            hide_credentials(f"{place}, line {line}: {problem}" if with_line else f"{place}: {problem}")
        )

    try:
        loader = _Loader(text)
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise refusal(f"the character U+{error.character:04X} is not allowed in YAML; remove it", line) from None
    try:
        return loader.get_single_data()
    except _YamlError as error:
        raise refusal(str(error.problem), _line_of(error)) from None
    except yaml.MarkedYAMLError as error:
        raise refusal(f"no valid YAML: {_explain(error)}; correct it", _line_of(error)) from None
    except (ValueError, OverflowError):
        raise refusal(
            "no valid YAML: an escape (\\U and digits) names no character; correct it", loader.line + 1
        ) from None
    finally:
        loader.dispose()


def parse_scalar(text: str) -> Any:
    """Return the number, true, false, null or text that a text is in YAML, without YAML's syntax: ``#`` is kept.

    Raises:
        SettingsError: it is a number that is refused.
    """
    loader = _Loader("")
    loader.advises_quotes = False
    tag = loader.resolve(yaml.ScalarNode, text, (True, False))
    if tag not in [f"{_TAG}{name}" for name in ("int", "float", "bool", "null")]:
        return text
    try:
        return loader.construct_object(yaml.ScalarNode(tag, text))
    except _YamlError as error:
        raise SettingsError(str(error.problem)) from None


class _YamlError(ConstructorError):
    """Valid YAML that is refused; the problem is a whole sentence."""

    def __init__(self, problem: str, node: Any) -> None:
        super().__init__(None, None, problem, node.start_mark)


class _Loader(yaml.SafeLoader):
    """The safe loader, which is strict."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.advises_quotes = True
        self._depth = 0
        self._extents: dict[int, tuple[int, int]] = {}  # of a node's id: its values and levels, aliases included

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        is_alias = isinstance(event, yaml.AliasEvent)
        if not is_alias and event.tag is not None and event.tag not in _TAGS:
            tag = event.tag.replace(_TAG, "!!")
            raise _YamlError(f"the tag {tag} is not supported; write the value without it", event)
        if self._depth >= MAX_DEPTH:
            raise _YamlError(f"values are nested more than {MAX_DEPTH} levels deep; write fewer", event)
        self._depth += 1
        node: Any = super().compose_node(parent, index)
        self._depth -= 1
        if is_alias and id(node) not in self._extents:
            raise _YamlError(f"the alias *{event.anchor} stands inside of what it repeats; write the values out", event)
        self._measure(node, event)
        return node

    def _measure(self, node: Any, event: Any) -> None:
        inner = [] if isinstance(node, yaml.ScalarNode) else node.value
        nodes = [each for pair in inner for each in pair] if isinstance(node, yaml.MappingNode) else inner
        extents = [self._extents[id(each)] for each in nodes]
        values = 1 + sum(values for values, _ in extents)
        depth = 1 + max((depth for _, depth in extents), default=0)
        if values > MAX_VALUES or depth > MAX_DEPTH:
            problem = f"more than {MAX_VALUES:,} values" if values > MAX_VALUES else f"more than {MAX_DEPTH} levels"
            raise _YamlError(f"{problem}, with what aliases (*name) repeat; write fewer", event)
        self._extents[id(node)] = values, depth

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key_node.tag == f"{_TAG}merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                is_scalar = isinstance(key_node, yaml.ScalarNode)
                what = f"the key {key_node.value or 'null'} is" if is_scalar else "a list or mapping as a key is"
                advice = f"write '{key_node.value}' in quotes" if is_scalar else "give a name"
                raise _YamlError(f"{what} no text; {advice}", key_node)
            if key in lines:
                raise _YamlError(
                    f"the key {key!r} occurs twice, on line {lines[key]} too; the first would be lost; "
                    "give one with both contents",
                    key_node,
                )
            lines[key] = key_node.start_mark.line + 1
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: Any) -> Any:
        value = super().construct_scalar(node)
        if isinstance(value, str) and _NO_TEXT.search(value):
            raise _YamlError("an escape names a zero or half of a pair, which no text has; remove it", node)
        return value

    def construct_number(self, node: Any) -> Any:
        text, is_integer = node.value, node.tag == f"{_TAG}int"
        if not isinstance(node, yaml.ScalarNode):
            raise _YamlError("a number was expected here; write it without the tag", node)
        if problem := _problem_of_number(text):
            raise _YamlError(f"{problem}, or '{text}' in quotes for a text" if self.advises_quotes else problem, node)
        try:
            value: int | float = self.construct_yaml_int(node) if is_integer else self.construct_yaml_float(node)
        except (ValueError, IndexError):  # of a tag, or of more digits than Python converts
            raise _YamlError(f"{text[:40]!r} is no number that can be used; give another one", node) from None
        if abs(value) > MAX_INTEGER if is_integer else not math.isfinite(value):
            raise _YamlError(f"{text[:40]} is too large; give a smaller number", node)
        return value


def _problem_of_number(text: str) -> str | None:
    """Say why a number is refused, and what to write; None where it is not."""
    if _NOT_FINITE.fullmatch(text):
        return f"{text} is no finite number; give one"
    if not (_OCTAL.fullmatch(text) or _SEXAGESIMAL.fullmatch(text)) or len(text) > 40:
        return None
    plain = text.lstrip("+-0") or "0"
    sign = "-" if text.startswith("-") else ""
    advice = f"write {sign}{plain}" if _OCTAL.fullmatch(text) and plain.isdigit() else "write one number"
    loaded = yaml.safe_load(text)
    meaning = f"is {loaded} in YAML" if isinstance(loaded, int | float) else "begins with a zero"
    return f"{text} {meaning}; {advice}"


def _line_of(error: yaml.MarkedYAMLError) -> int:
    mark = error.problem_mark or error.context_mark
    return mark.line + 1 if mark else 1


def _explain(error: yaml.MarkedYAMLError) -> str:
    """The message of YAML in one line, without its excerpt."""
    if error.problem == "but found another document":
        return "a second document begins here (---); give one document"
    text = (error.problem or "").replace("character '\\t'", "a tab")
    if text == "mapping values are not allowed here":
        return "a colon is not expected here; check the indentation, or put a text with a colon in quotes"
    if "a tab" in text:
        return f"{text}; indent with spaces"
    if error.context and error.context_mark:
        return f"{text} ({error.context} that begins on line {error.context_mark.line + 1})"
    return text


def _resolvers() -> Mapping[str, Any]:
    """The types that plain values have by their form, by the first character."""
    known = yaml.SafeLoader.yaml_implicit_resolvers
    return {first: [each for each in found if each[0] not in _NO_TYPES] for first, found in known.items()}


_Loader.yaml_implicit_resolvers = _resolvers()
for _tag in ("int", "float"):
    _Loader.add_constructor(f"{_TAG}{_tag}", _Loader.construct_number)
