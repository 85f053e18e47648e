"""YAML as people mean it: what YAML 1.1 would lose or read as another number is refused with its line.

Refused are keys that occur twice in a mapping (the first would be lost), numbers with a leading zero (``010`` is 8),
numbers with colons (``1:30`` is 90), infinities and NaN. In quotes all of these are texts.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_OCTAL = re.compile(r"[-+]?0[0-9_]+")
_SEXAGESIMAL = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|nan)", re.IGNORECASE)


def parse_yaml(text: str) -> Any:
    """Parse a YAML document.

    Raises:
        yaml.YAMLError: it is no valid YAML, or holds what is refused; the message has the line.
    """
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    """The safe loader, which is strict."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str | int | float) and key in lines:
                problem = (
                    f"the key {key!r} occurs twice, on line {lines[key]} too; the first would be lost; "
                    "give one with both contents"
                )
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            if isinstance(key, str | int | float):
                lines[key] = key_node.start_mark.line + 1
        return super().construct_mapping(node, deep)

    def construct_number(self, node: Any) -> Any:
        text = node.value
        if _OCTAL.fullmatch(text) or _SEXAGESIMAL.fullmatch(text):
            plain = text.lstrip("+-0") or "0"
            advice = f"write {plain}" if _OCTAL.fullmatch(text) and plain.isdigit() else "write one number"
            value = yaml.safe_load(text)
            problem = f"{text} is {value} in YAML; {advice}, or '{text}' in quotes for a text"
        elif _NOT_FINITE.fullmatch(text):
            problem = f"{text} is no finite number; give one, or '{text}' in quotes for a text"
        else:
            is_integer = node.tag.endswith(":int")
            return self.construct_yaml_int(node) if is_integer else self.construct_yaml_float(node)
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


for _tag in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.construct_number)
