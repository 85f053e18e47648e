"""Loading settings, and validating them as a whole.

A YAML file overrides a preset, and ``--set section.key=value`` overrides both. The schema is in
``launcher/config/settings.py``.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, get_args, get_origin

import pydantic
import yaml

from data_shards.credentials import find_credentials, hide_credentials
from data_shards.strict_json import read_json_file
from launcher.config.field_types import is_optional, is_section, kinds_of, typed_value
from launcher.config.given_values import resolve_given, resolve_value
from launcher.config.plain_values import check_plain, read_yaml_mapping
from launcher.config.settings import Settings, SettingsError, sections_of_stages
from launcher.config.sqlite_uris import sqlite_uri
from launcher.config.strict_yaml import parse_yaml
from mmcot.errors import InputError


def preset_names() -> list[str]:
    """The names of the built-in presets."""
    folder = resources.files("launcher.config") / "presets"
    return sorted(path.name.removesuffix(".yaml") for path in folder.iterdir() if path.name.endswith(".yaml"))


def load_settings(
    *, preset: str | None = None, config: str | Path | None = None, overrides: Sequence[str] = ()
) -> Settings:
    """Merge preset, file and overrides, and validate the result.

    Raises:
        SettingsError: a name is unknown (the message names the nearest), or a value is not valid.
    """
    layers = setting_layers(preset=preset, config=config, overrides=overrides)
    values: dict[str, Any] = {}
    for _, layer in layers:
        values = _merge(_without_other_length(values, layer), layer)
    if name := _name_by_folder(layers):
        values = set_value(values, "run.name", name)
    return parse_settings(values, layers)


def _without_other_length(values: dict[str, Any], layer: dict[str, Any]) -> dict[str, Any]:
    """The values without a stage's ``num_steps`` where the layer gives ``num_epochs``, and the other way round."""
    for section in layer:
        given = layer[section] if isinstance(layer[section], dict) else {}
        if section == "stages":
            inner = values.get("stages", {})
            values = values | {"stages": _without_other_length(inner, given)} if isinstance(inner, dict) else values
            continue
        for name, other in (("num_epochs", "num_steps"), ("num_steps", "num_epochs")):
            if given.get(name) is not None and other not in given and isinstance(values.get(section), dict):
                values = values | {section: values[section] | {other: None}}
    return values


def _name_by_folder(layers: Sequence[tuple[str, dict[str, Any]]]) -> str | None:
    """The folder's name for a run whose folder was given, and whose name only a preset gives."""
    given = [(source, run) for source, layer in layers if isinstance(run := layer.get("run"), dict)]
    if any("name" in run for source, run in given if not source.startswith("preset ")):
        return None
    folders = [run["dir"] for _, run in given if "dir" in run]
    return name_of_folder(folders[-1]) if folders and isinstance(folders[-1], str) else None


def name_of_folder(folder: str) -> str | None:
    """The name that a run's folder gives it; None where the folder's name has no letter that a name may have."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(folder).name).lstrip(".-") or None


def setting_layers(
    *, preset: str | None = None, config: str | Path | None = None, overrides: Sequence[str] = ()
) -> list[tuple[str, dict[str, Any]]]:
    """Return where settings come from, each with its plain values; a later one overrides the earlier.

    Raises:
        SettingsError: as ``load_settings``, before values are validated.
    """
    if preset is None and config is None:
        raise SettingsError(f"no settings given: use --preset ({', '.join(preset_names())}) or --config FILE")
    layers = []
    if preset is not None:
        if preset not in preset_names():
            raise SettingsError(
                f"preset {preset!r} is unknown;{_nearest(preset, preset_names())} there are {', '.join(preset_names())}"
            )
        text = (resources.files("launcher.config") / "presets" / f"{preset}.yaml").read_text(encoding="utf-8")
        layers.append((f"preset {preset}", sections_of_stages(parse_yaml(text, f"preset {preset}"))))
    if config is not None:
        layers.append((str(config), sections_of_stages(_read_yaml(Path(config)))))
    given: dict[str, Any] = {}
    for override in overrides:
        given = _merge(given, sections_of_stages(_parse_override(override)))
    return [*layers, ("--set", given)] if given else layers


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


def check_no_credentials(name: str, value: Any) -> None:
    """Check that a value contains no secret at any depth: settings are shown in run.yaml, MLflow and the report.

    Raises:
        SettingsError: it contains one; the message names the place and not the secret.
    """
    if found := find_credentials(value, name):
        raise SettingsError(
            f"{found} holds a user, password or key, which would be shown together with the settings; remove it and "
            "give it in the environment (MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, COMET_API_KEY, or as "
            "the object store's own tools read it)"
        )


def merge_override(values: dict[str, Any], override: str) -> dict[str, Any]:
    """Merge one ``section.key=value`` into plain values."""
    return _merge(values, sections_of_stages(_parse_override(override)))


def set_value(values: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    """Merge one value into plain values, by its dotted name."""
    for key in reversed(name.split(".")):
        value = {key: value}
    return _merge(values, sections_of_stages(value))


def parse_settings(values: dict[str, Any], layers: Sequence[tuple[str, dict[str, Any]]] = ()) -> Settings:
    """Validate plain values, such as those of a run.yaml.

    Args:
        layers: where the values come from, as ``setting_layers``; the messages name it.
    """
    check_plain(values)
    try:
        settings = Settings.model_validate(values)
    except pydantic.ValidationError as error:
        raise SettingsError("\n".join(_cut(line) for line in _explain(error.errors(), layers))) from None
    plain = settings.model_dump()
    check_plain(plain)  # validation makes numbers of texts
    check_no_credentials("", plain)
    return settings


def dump_settings(settings: Settings) -> str:
    """Return the resolved settings as YAML, with every default."""
    return yaml.safe_dump(settings.model_dump(), sort_keys=False, allow_unicode=True)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = read_yaml_mapping(path)
    except FileNotFoundError:
        raise SettingsError(f"settings file {path} does not exist;{nearest_file(path)}".removesuffix(";")) from None
    except OSError as error:
        raise SettingsError(f"settings file {path} cannot be read: {error.strerror}; give a YAML file") from None
    nested: dict[str, Any] = {}
    for name, value in values.items():  # a setting may also be given by its dotted name
        for key in reversed(name.split(".")):
            value = {key: value}
        nested = _merge(nested, value)
    return resolve_given(nested, str(path))


def _parse_override(override: str) -> dict[str, Any]:
    name, equals, text = override.partition("=")
    name = name.strip()
    if not equals or ("." not in name and name != "extensions"):
        near = "" if name in setting_names() else _section_note(name) or nearest_setting(name)
        raise SettingsError(
            f"--set {hide_credentials(override)!r} must look like section.key=value, such as "
            f"training.learning_rate=1e-3;{near}".removesuffix(";")
        )
    check_plain(text, name)
    value = resolve_value(name, text if text.strip() == "" else typed_value(name, text), "--set")
    for key in reversed(name.split(".")):
        value = {key: value}
    return value


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _explain(problems: Sequence[Any], layers: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
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
        return [f"{setting} = {value}: this is a section, which has settings in it;{_section_note(name)}"]
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
    return _cut(repr(value), 300)


def _cut(text: str, length: int = 1000) -> str:
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


def _section_note(name: str) -> str:
    is_section = any(each.startswith(f"{name}.") for each in setting_names())
    return f" `mmcot config explain {name}` lists the settings of the section {name}" if is_section else ""


def nearest_file(path: Path) -> str:
    """Return " did you mean X?" with the file of a similar name in the same folder, or "" where there is none."""
    names = os.listdir(path.parent) if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    return f" did you mean {path.parent / close[0]}?" if close else ""


def _nearest(name: str, names: Sequence[str], *, cutoff: float = 0.6) -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=cutoff)
    return f" did you mean {close[0]}?" if close else ""


# Names of other libraries, and short forms, for the last part of a setting's name.
_OTHER_NAMES = {
    "lr": "learning_rate",
    "bs": "micro_batch_size",
    "batch_size": "global_batch_size",
    "per_device_train_batch_size": "micro_batch_size",
    "train_batch_size": "global_batch_size",
    "epochs": "num_epochs",
    "num_train_epochs": "num_epochs",
    "steps": "num_steps",
    "max_steps": "num_steps",
    "wd": "weight_decay",
    "warmup": "warmup_steps",
    "lr_scheduler_type": "schedule",
    "max_grad_norm": "clip_norm",
    "grad_clip": "clip_norm",
    "save_steps": "checkpoint_every",
    "eval_steps": "validate_every",
    "logging_steps": "log_every",
    "save_total_limit": "keep_checkpoints",
    "gradient_checkpointing": "activation_checkpointing",
    "bf16": "precision",
    "fp16": "precision",
    "gradient_accumulation_steps": "global_batch_size",
    "max_seq_length": "max_source_tokens",
    "train_file": "path",
    "dataset": "path",
    "tracking_uri": "uri",
    "mlflow_tracking_uri": "uri",
    "experiment_name": "experiment",
    "dtype": "precision",
    "gpus": "num_workers",
    "num_gpus": "num_workers",
    "workers": "num_workers",
    "output_dir": "dir",
    "model_name_or_path": "pretrained",
    "backbone": "pretrained",
    "max_new_tokens": "max_target_tokens",
    "max_length": "max_source_tokens",
    "image_features": "features",
    "seed": "seed",
}


_OTHER_SECTIONS = {"mlflow": "tracking", "zero_optimization": "training", "optimizer": "training", "ray": "cluster"}


def nearest_setting(name: str) -> str:
    """Return " did you mean X?" with the nearest setting by its whole path, or "" where none is near.

    A name of another library, a short form or a right key in another section counts before a similar spelling.
    """
    names = setting_names()
    if re.match(r"stages\.[^.]+\.", name):  # the settings of a stage are the same for all
        own = name.rpartition(".")[0]
        names += [f"{own}.{each.rpartition('.')[2]}" for each in names if each.startswith("answer.")]
    section, _, given = name.rpartition(".")
    key = _OTHER_NAMES.get(given, given)
    same = [each for each in names if each.rpartition(".")[2] == key]
    if same:
        own = [each for each in same if each.startswith(f"{section}.")] if section else []
        common = [each for each in same if each.startswith("training.")]
        value = "=bf16" if given in ("bf16", "fp16") else ""
        stages = [each for each in same if each.startswith(("rationale.", "answer."))]  # each has one, as num_epochs
        return f" did you mean {' and '.join((own or common)[:1] or stages or same[:1])}{value}?"
    sections = list(dict.fromkeys(each.rpartition(".")[0] for each in names if "." in each))
    if not section:
        if name in _OTHER_SECTIONS:
            return f" did you mean {_OTHER_SECTIONS[name]}?"
        return _nearest(name, sections) or _nearest(name, [each.rpartition(".")[2] for each in names])
    own = {each.rpartition(".")[2]: each for each in names if each.startswith(f"{section}.")}
    close = difflib.get_close_matches(given, own, n=1, cutoff=0.6)
    return f" did you mean {own[close[0]]}?" if close else _nearest(name, names, cutoff=0.8)


def read_deepspeed(value: str | dict[str, Any] | None) -> dict[str, Any]:
    """Return a user's DeepSpeed settings, given as a mapping or as a JSON file.

    Raises:
        SettingsError: the file does not exist, is no JSON object, or contains a secret or what JSON does not have.
    """
    if not isinstance(value, str):
        return value or {}
    try:
        config = read_json_file(value)
        check_plain(config, "training.deepspeed")
    except FileNotFoundError:
        near = nearest_file(Path(value))
        raise SettingsError(
            f"training.deepspeed {value} does not exist;{near} give a JSON file of DeepSpeed settings"
        ) from None
    except OSError as error:
        raise SettingsError(
            f"training.deepspeed {value} cannot be read: {error.strerror}; give a JSON file of DeepSpeed settings"
        ) from None
    except InputError as error:
        message = hide_credentials(str(error))
        raise SettingsError(f"training.deepspeed {message}; give a JSON file of DeepSpeed settings") from None
    if not isinstance(config, dict):
        raise SettingsError(f"training.deepspeed {value} holds a {type(config).__name__}, expected a JSON object")
    check_no_credentials(f"training.deepspeed {value}", config)  # its content is written to files for workers
    return config


def tracking_uri(settings: Settings) -> str:
    """Return the setting, else MLFLOW_TRACKING_URI, else mlflow.db in the folder of the runs.

    Raises:
        SettingsError: the address contains a user, password or key, which would be shown with it.
    """
    check_no_credentials("tracking.uri", settings.tracking.uri)
    check_no_credentials("MLFLOW_TRACKING_URI", os.environ.get("MLFLOW_TRACKING_URI"))
    default = sqlite_uri(settings.run_dir.absolute().parent / "mlflow.db")
    return settings.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or default


def value_of(settings: Settings, name: str) -> Any:
    """Return a setting by its dotted name; None in the section of a stage that has no settings."""
    value: Any = settings
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else getattr(value, part, None)
    return value


def setting_names(section: type[pydantic.BaseModel] = Settings, prefix: str = "") -> list[str]:
    """Return the dotted names of all settings."""
    names = []
    for key, field in section.model_fields.items():
        optional = () if get_origin(field.annotation) is dict else get_args(field.annotation)
        kinds: list[Any] = [kind for kind in (field.annotation, *optional) if is_section(kind)]
        names += setting_names(kinds[0], f"{prefix}{key}.") if kinds else [f"{prefix}{key}"]
    return names
