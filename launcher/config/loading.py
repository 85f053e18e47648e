"""Loading settings, and validating them as a whole.

A YAML file overrides a preset, and ``--set section.key=value`` overrides both. The schema is in
``launcher/config/settings.py``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import pydantic
import yaml

from data_shards.credentials import find_credentials, hide_credentials
from data_shards.strict_json import read_json_file
from launcher.config.explanations import cut, explain, source_of
from launcher.config.field_types import typed_value
from launcher.config.given_values import resolve_given, resolve_value
from launcher.config.plain_values import check_plain, read_yaml_mapping
from launcher.config.setting_names import nearest_file, nearest_name, nearest_setting, section_note, setting_names
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
                f"preset {preset!r} is unknown;{nearest_name(preset, preset_names())} there are "
                f"{', '.join(preset_names())}"
            )
        text = (resources.files("launcher.config") / "presets" / f"{preset}.yaml").read_text(encoding="utf-8")
        layers.append((f"preset {preset}", sections_of_stages(parse_yaml(text, f"preset {preset}"))))
    if config is not None:
        layers.append((str(config), sections_of_stages(_read_yaml(Path(config)))))
    given: dict[str, Any] = {}
    for override in overrides:
        given = _merge(given, sections_of_stages(_parse_override(override)))
    return [*layers, ("--set", given)] if given else layers


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
    _check_plain(values, layers)
    try:
        settings = Settings.model_validate(values)
    except pydantic.ValidationError as error:
        raise SettingsError("\n".join(cut(line) for line in explain(error.errors(), layers))) from None
    plain = settings.model_dump()
    _check_plain(plain, layers)  # validation makes numbers of texts
    check_no_credentials("", plain)
    return settings


def _check_plain(values: dict[str, Any], layers: Sequence[tuple[str, dict[str, Any]]]) -> None:
    try:
        check_plain(values)
    except SettingsError as error:
        named = re.match(r"setting ([\w.]+)", str(error))
        source = source_of(named[1], layers) if named else "default"
        if source in ("default", "--set"):
            raise
        raise SettingsError(f"{source}: {error}") from None


def dump_settings(settings: Settings) -> str:
    """Return the resolved settings as YAML, with every default."""
    return yaml.safe_dump(settings.model_dump(), sort_keys=False, allow_unicode=True)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = read_yaml_mapping(path)
    except FileNotFoundError:
        raise SettingsError(
            f"settings file {path} does not exist;{nearest_file(path) or ' give the path of a YAML file'}"
        ) from None
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
        near = "" if name in setting_names() else section_note(name) or nearest_setting(name)
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
