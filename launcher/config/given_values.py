"""Values as people give them, in a file or by ``--set``, before they are validated.

    resolve_given({"data": {"path": "~/mine.jsonl"}}, "my.yaml")     # {"data": {"path": "/home/me/mine.jsonl"}}

Local places may begin with ``~`` and contain ``$NAME`` or ``${NAME}``. They are resolved once, where they are given,
so that run.yaml and the workers have the whole path. URLs stay as they are.
"""

from __future__ import annotations

import os
import re
from typing import Any

from data_shards.credentials import hide_credentials
from launcher.config.field_types import is_optional, kinds_of, takes_text
from launcher.config.settings import Data, SettingsError

# Settings that name a file or folder, some of them also an id or a URL; of every stage also `rationales`.
LOCAL_PLACES = (
    "run.dir",
    "data.path",
    "data.shards_dir",
    "data.cache_dir",
    "data.vision_features",
    "data.vision_model",
    "data.captions",
    "model.pretrained",
    "training.deepspeed",
    "training.nvme_dir",
    "training.checkpoint_url",
    "tracking.uri",
)
_DEFAULT_CACHE = Data.model_fields["cache_dir"].default  # is in the home folder of each machine
_EMPTY_MEANS_SOMETHING = re.compile(r"(rationale|answer|stages\.[^.]+)\.format|cluster\.env\..*")
_VARIABLE = re.compile(r"\$(?:\{([^}]*)\}|([A-Za-z_][A-Za-z0-9_]*))")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|sqlite:")


def resolve_given(values: dict[str, Any], source: str) -> dict[str, Any]:
    """Return plain values with their local places resolved.

    Args:
        source: where they come from, as ``setting_layers`` names it.

    Raises:
        SettingsError: a text is empty where that means nothing, or a variable in a place is not set.
    """
    return _resolve(values, "", source)


def resolve_value(name: str, value: Any, source: str) -> Any:
    """Return the value of one setting with its local places resolved; of a tuning, all that it searches.

    Raises:
        SettingsError: as ``resolve_given``.
    """
    if name in ("tuning.space", "tuning.arms") and isinstance(value, dict):
        return {key: _resolve_searched(name, key, inner, source) for key, inner in value.items()}
    if isinstance(value, dict):
        return value if name == "training.deepspeed" else _resolve(value, f"{name}.", source)
    if not isinstance(value, str):
        return value
    _check_not_empty(name, value, source)
    return _resolve_place(name, value, source) if is_local_place(name) else value


def is_local_place(name: str) -> bool:
    """Whether a setting names a file or folder."""
    return name in LOCAL_PLACES or (name.endswith(".rationales") and kinds_of(name) is not None)


def _resolve(values: dict[str, Any], prefix: str, source: str) -> dict[str, Any]:
    return {key: resolve_value(f"{prefix}{key}", value, source) for key, value in values.items()}


def _resolve_searched(name: str, key: str, value: Any, source: str) -> Any:
    """The values of an arm, or the choices of a setting in the search space."""
    if not isinstance(value, dict):
        return value
    if name == "tuning.arms":
        return {setting: resolve_value(setting, each, source) for setting, each in value.items()}
    return {
        kind: [resolve_value(key, each, source) for each in values] if isinstance(values, list) else values
        for kind, values in value.items()
    }


def _check_not_empty(name: str, value: str, source: str) -> None:
    kinds = kinds_of(name)
    if value.strip() or kinds is None or _EMPTY_MEANS_SOMETHING.fullmatch(name):
        return
    what = "a text" if takes_text(kinds) else "a value"
    remedy = f"give {what}, or null for none" if is_optional(kinds) else f"give {what}, or leave the setting out"
    reason = "a variable of the shell in it may not be set" if source == "--set" else "it has only spaces, or nothing"
    raise SettingsError(f"{_named(name, source)} is empty: {reason}; {remedy}")


def _resolve_place(name: str, value: str, source: str) -> str:
    if _URL.match(value) or (name == "data.cache_dir" and value == _DEFAULT_CACHE):
        return value
    if "$" in value and not os.path.lexists(value):
        value = _VARIABLE.sub(lambda found: _variable(name, value, found[1] or found[2] or "", source), value)
    return os.path.expanduser(value) if value.startswith("~") and not os.path.lexists(value) else value


def _variable(name: str, value: str, variable: str, source: str) -> str:
    if not os.environ.get(variable):
        state = "is empty" if variable in os.environ else "is not set"
        raise SettingsError(
            f"{_named(name, source)} = {hide_credentials(repr(value))}: the environment variable {variable} {state}; "
            "set it, or write the path itself"
        )
    return os.environ[variable]


def _named(name: str, source: str) -> str:
    return f"setting {name}" if source == "--set" else f"{source}: setting {name}"
