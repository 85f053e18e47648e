"""Every setting with its type, unit, default and meaning; from the schema, so that pages and editors say the same.

setting_named("training.learning_rate").type      # "number above 0"
settings_page()                                   # docs/settings.md
json_schema()                                     # with which an editor completes and checks a YAML file
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from launcher.config.chains import ANSWER, CHAINS, RATIONALE
from launcher.config.setting_names import nearest_setting, setting_names
from launcher.config.settings import SPACE_KINDS, Settings, SettingsError
from mmcot.models.bridge_names import BUILT_IN
from mmcot.texts.prompts import INPUTS, OUTPUTS, PAPER_NAMES

# The unit of a setting by the end of its name, where it has one.
_UNITS = {
    "_gb": "gigabytes",
    "_s": "seconds",
    "_tflops": "TFLOP/s",
    "_tokens": "tokens",
    "_steps": "optimizer steps",
    "_epochs": "epochs",
    "_every": "optimizer steps",
    "batch_size": "samples",
    "_samples": "samples",
    "samples_per_shard": "samples",
    "_shards": "shards",
    "num_train": "samples",
    "num_val": "samples",
    "num_test": "samples",
    "num_workers": "processes",
    "min_workers": "processes",
    "_processes": "processes",
    "cpus_per_worker": "processors",
    "gpus_per_worker": "GPUs",
    "_pictures": "pictures",
    "keep_checkpoints": "checkpoints",
}
_NOT_IN_UNITS = ("tuning.num_samples", "data.unreadable_pictures")
_PAGE_START = """# Settings

Every setting, as `mmcot config explain` prints it. A preset is overridden by a YAML file (`--config`), and both by
`--set section.key=value`. `mmcot config explain training --preset demo` also shows each value and where it comes from.

`mmcot config schema > mmcot.schema.json` writes a JSON schema. With this first line an editor that has a YAML language
server completes and checks a settings file:

```yaml
# yaml-language-server: $schema=mmcot.schema.json
```

## How a value is written

**With `--set`** the type of the setting decides:

| type | what is typed | examples |
|---|---|---|
| text | the text as it is; one pair of quotes around all of it is removed | `--set 'data.path=my set #1/in.jsonl'` |
| integer, number | a number as in YAML; `010`, `1:30`, `inf` and `nan` are refused | `1_000`, `1e-3` |
| true or false | also `yes`, `no`, `on`, `off`, `1`, `0` | `--set training.tf32=yes` |
| list | YAML in `[` `]`, or items between commas | `--set data.mini_sqa.skills=magnets,map` |
| mapping | YAML in `{` `}` | `--set "data.splits={train: minitrain}"` |
| a key of a mapping | as its type, by its dotted name | `--set cluster.env.NCCL_DEBUG=INFO` |
| text or mapping | a mapping if it begins with `{`, else a text | `--set training.deepspeed=ds.json` |

`null` means none; the text is `'null'`, with quotes that the shell does not remove: `--set "data.features='null'"`. An
empty value, which an unset variable of the shell leaves, is refused, except for `format` and in `cluster.env`.

**In a file** (YAML in UTF-8, with or without a mark, or in UTF-16 with its mark) what YAML would lose or read as
another value is refused with file and line: a key that occurs twice or is no text, `010`, `1:30`, infinities, tags
(`!!set`), several documents, more than 50 levels, and aliases that repeat too much. Dates are texts. A text that looks
like a number needs quotes. A setting may be given by its dotted name.

**Places** (every setting that names a file or folder) may begin with `~` and contain `$NAME` or `${NAME}`, from
`--set` and from files. They are resolved once, on the machine where the command is typed, and run.yaml has the result;
a variable that is not set is refused by its name. URLs stay as they are, and so does a file that exists under such a
name.
"""
STAGE = "NAME"  # stands for a stage's name in stages.NAME


@dataclasses.dataclass(frozen=True)
class Setting:
    """A setting; ``type`` and ``default`` as a user writes them, ``unit`` empty where there is none."""

    name: str
    type: str
    unit: str
    default: str
    meaning: str


def all_settings() -> list[Setting]:
    """Every setting, in the order of the sections."""
    schema = Settings.model_json_schema()
    return _settings_of(schema, schema["$defs"], "")


def setting_named(name: str) -> list[Setting]:
    """Return a setting, or those of a section; of a stage's section by its own name.

    Raises:
        SettingsError: there is none; the message names the nearest.
    """
    parts = name.split(".")
    known = ".".join([parts[0], STAGE, *parts[2:]]) if parts[0] == "stages" and len(parts) > 1 else name
    found = [each for each in all_settings() if each.name == known or each.name.startswith(f"{known}.")]
    if not found:
        raise SettingsError(f"setting {name} is unknown;{nearest_setting(name)} `mmcot config explain` lists all")
    return [dataclasses.replace(each, name=name + each.name[len(known) :]) for each in found]


def json_schema() -> dict[str, Any]:
    """The JSON schema of a settings file, in which every section and key may be left out.

    Without ``extensions`` the names of chains and fusions are the built-in ones.
    """
    schema = Settings.model_json_schema()
    stages = schema["properties"]["stages"]
    stages["properties"] = {name: schema["properties"][name] for name in (RATIONALE, ANSWER)}
    for section in ("RationaleStage", "AnswerStage", "ReadingStage"):
        schema["$defs"][section]["properties"]["format"]["enum"] = _formats()
    schema["$defs"]["Tuning"]["properties"]["space"]["propertyNames"] = {
        "anyOf": [{"enum": setting_names()}, {"pattern": r"^stages\.[^.]+\.[a-z_]+$"}]
    }
    schema["$defs"]["Tuning"]["properties"]["space"]["additionalProperties"] = {
        "type": "object",
        "minProperties": 1,
        "maxProperties": 1,
        "propertyNames": {"enum": list(SPACE_KINDS)},
        "additionalProperties": {"type": "array", "minItems": 1},
    }
    built_in = {
        "run": {"properties": {"chain": {"enum": list(CHAINS)}}},
        "model": {"properties": {"fusion": {"enum": list(BUILT_IN)}}},
    }
    schema["if"], schema["then"] = {"not": {"required": ["extensions"]}}, {"properties": built_in}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Settings of mmcot",
        **{key: value for key, value in schema.items() if key != "title"},
    }


def _formats() -> list[str]:
    """Every prompt format, the names of the paper, and "" for the chain's own."""
    return ["", *(f"{first}-{last}" for first in INPUTS for last in OUTPUTS), *PAPER_NAMES]


def settings_page() -> str:
    """The page docs/settings.md."""
    sections: dict[str, list[Setting]] = {}
    for each in all_settings():
        sections.setdefault(each.name.rpartition(".")[0] or each.name, []).append(each)
    lines = [_PAGE_START]
    for section, settings in sections.items():
        lines += [f"## {section}", "", "| setting | type | default | meaning |", "|---|---|---|---|"]
        for each in settings:
            cells = (f"`{each.name}`", _with_unit(each), f"`{each.default}`", each.meaning)
            lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("<", "\\<") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _with_unit(setting: Setting) -> str:
    return f"{setting.type}, {setting.unit}" if setting.unit else setting.type


def _settings_of(section: dict[str, Any], definitions: dict[str, Any], prefix: str) -> list[Setting]:
    settings = []
    for key, value in section["properties"].items():
        name = f"{prefix}{key}"
        if (inner := _section_in(value, definitions)) is not None:
            settings += _settings_of(inner, definitions, f"{name}.")
        elif (of_each := _section_in(value.get("additionalProperties"), definitions)) is not None:
            settings += _settings_of(of_each, definitions, f"{name}.{STAGE}.")
        else:
            default = _shown(value.get("default"))
            settings.append(Setting(name, _type_of(value), _unit_of(name), default, value.get("description", "")))
    return settings


def _section_in(value: Any, definitions: dict[str, Any]) -> dict[str, Any] | None:
    """The section that a schema refers to, directly or as one of its kinds."""
    if not isinstance(value, dict):
        return None
    for kind in (value, *value.get("anyOf", ()), *value.get("allOf", ())):
        if "$ref" in kind:
            return definitions[kind["$ref"].rpartition("/")[2]]
    return None


def _unit_of(name: str) -> str:
    if name in _NOT_IN_UNITS:
        return ""
    return next((unit for ending, unit in _UNITS.items() if name.endswith(ending)), "")


def _type_of(value: dict[str, Any]) -> str:
    kinds = value.get("anyOf")
    if kinds:
        return " or ".join(_type_of(kind) for kind in kinds)
    if "enum" in value:
        return f"one of {', '.join(map(str, value['enum']))}"
    if "const" in value:
        return _shown(value["const"])
    if value.get("type") == "array":
        return f"list of {_type_of(value.get('items', {}))}s"
    names = {"integer": "integer", "number": "number", "boolean": "true or false", "string": "text", "null": "null"}
    text = names.get(value.get("type", ""), "mapping" if value.get("type") == "object" else "value")
    bounds = {
        "exclusiveMinimum": "above",
        "minimum": "from",
        "exclusiveMaximum": "below",
        "maximum": "to",
    }
    limits = [f"{word} {_shown(value[key])}" for key, word in bounds.items() if key in value]
    return " ".join([text, *limits])


def _shown(value: Any) -> str:
    """A value as YAML would have it on one line."""
    if value is None:
        return "null"
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) and value else json.dumps(value)
