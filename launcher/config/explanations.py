"""Sentences on values that are not valid: the setting, where it comes from, the value and what was expected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from data_shards.credentials import hide_credentials
from launcher.config.field_types import is_optional, kinds_of
from launcher.config.setting_names import nearest_setting, section_note


def source_of(name: str, layers: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """Return which of ``setting_layers`` gives a setting, by its dotted name; "default" where none does."""
    found = "default"
    for source, values in layers:
        value: Any = values
        for part in name.split("."):
            if not isinstance(value, dict):  # a whole section was set to none
                break
            if part not in value:
                break
            value = value[part]
        else:
            found = source
    return found


def explain(problems: Sequence[Any], layers: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """A line for each wrong setting; what the kinds of one setting expect is joined."""
    lines: dict[str, list[Any]] = {}
    for problem in problems:
        lines.setdefault(_name_of(problem), []).append(problem)
    return [line for name, of_name in lines.items() for line in _lines_of(name, of_name, layers)]


def _name_of(problem: Any) -> str:
    """The dotted name of a problem's setting, without the kind of value of which it is."""
    parts = [str(part) for part in problem["loc"] if part != "[key]"]
    for end in range(1, len(parts)):
        kinds = kinds_of(".".join(parts[:end])) or ()
        if len([kind for kind in kinds if kind is not type(None)]) > 1:
            return ".".join(parts[:end])
    return ".".join(parts)


def _lines_of(name: str, problems: Sequence[Any], layers: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    problem = problems[0]
    if problem["type"] == "value_error" and not name:
        return [str(problem["ctx"]["error"])]
    if problem["type"] == "missing" and isinstance(problem["loc"][-1], int):
        return [f"setting {'.'.join(name.split('.')[:-1])} has too few values; give two, such as [100, 110]"]
    if problem["type"] == "missing":
        return [f"setting {name} is missing; a preset such as `--preset demo` gives it a value"]
    source = source_of(name, layers)
    setting = f"setting {name}" if source in ("default", "--set") else f"{source}: setting {name}"
    if problem["type"] == "extra_forbidden":
        return [f"{setting} is unknown;{nearest_setting(name)} `mmcot config explain` lists all"]
    if problem["type"] == "value_error":
        return [f"{setting}: {each['ctx']['error']}" for each in problems]
    value = hide_credentials(_shortened(problem["input"]))
    if problem["type"] == "model_type":
        return [f"{setting} = {value}: this is a section, which has settings in it;{section_note(name)}"]
    kinds = kinds_of(name) or ()
    is_number = type(problem["input"]) in (int, float) and str in kinds
    advice = f"; in quotes it is a text: '{value}'" if is_number else ""
    return [f"{setting} = {value}: {_expectation(problems, is_optional(kinds))}{advice}"]


def _expectation(problems: Sequence[Any], optional: bool) -> str:
    """What a setting's kinds of value expect, such as "expected an integer or null"."""
    expected = []
    for each in problems:
        text = _EXPECTED.get(each["type"]) or each["msg"].removeprefix("Input should be ")
        if text == each["msg"]:  # a sentence of its own, such as on a pattern
            return text[:1].lower() + text[1:]
        expected.append(text)
    null = ["null"] if optional and all(each["type"] in _EXPECTED for each in problems) else []
    return f"expected {' or '.join(dict.fromkeys([*expected, *null]))}"


def _shortened(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return cut(repr(value), 300)


def cut(text: str, length: int = 1000) -> str:
    """Return a text of at most this many characters, and a mark where some were cut."""
    return text if len(text) <= length else f"{text[:length]} ..."


_EXPECTED = {
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "int_parsing": "an integer",
    "int_parsing_size": "a smaller integer",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_parsing": "a number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "a text",
    "dict_type": "a mapping, such as {name: value}",
    "list_type": "a list, such as [a, b]",
    "tuple_type": "a list, such as [1, 2]",
}
