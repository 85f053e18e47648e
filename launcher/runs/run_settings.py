"""The settings of a run, ``run.yaml`` in its folder; only this module reads the file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_shards.atomic_files import commit_bytes, commit_json, read_json
from launcher.config.extensions import is_loaded, load_extensions, sha256_of_module
from launcher.config.loading import dump_settings, name_of_folder, parse_settings
from launcher.config.plain_values import read_yaml_mapping
from launcher.config.settings import Settings, SettingsError
from launcher.runs.places import place_around, uri_around
from launcher.runs.run_dir import RunDir, RunError

RUN_SETTINGS = "run.yaml"
EXTENSIONS = "extensions.json"  # the sha256 of every extension at the run's first start
_DECIDED_AT_START = (RUN_SETTINGS, EXTENSIONS, "device.json", "zero_stage.json")
_OF_ANOTHER_RUN = (
    "mlflow.json",
    "logs/identity",
    "logs/identity-place.json",
    "logs/tracking.jsonl",
    "logs/code-data.json",
)
_OF_A_START = {*_DECIDED_AT_START, "mlflow.json", "lock.json", ".lock", "rank-token", "stop.json", "logs"}
_FREE_SETTINGS = {  # may change between attempts, because no result depends on them
    ("run", "dir"),
    *(("data", name) for name in ("remote", "cache_dir", "cache_gb")),
    *(("cluster", name) for name in ("address", "num_workers", "min_workers", "use_gpu", "env")),  # see cluster/gpus.py
    *(("tracking", name) for name in ("uri", "send_every_s", "register_models")),
    ("generation", "max_attempts"),
    ("generation", "hang_timeout_s"),
    ("tuning", "max_concurrent"),
    ("tuning", "time_budget_s"),
    *(
        ("training", name)
        for name in (
            "checkpoint_every",
            "keep_checkpoints",
            "checkpoint_url",
            "validate_every",
            "log_every",
            "profile_steps",
            "max_failures",
            "hang_timeout_s",
            "peak_tflops",
            "loader_processes",
            "activation_checkpointing",
            "cuda_graphs",
            "offload",
            "nvme_dir",
        )
    ),
}
_DATA_PLACES = ("data.path", "data.shards_dir")


def write_or_verify_settings(run_dir: RunDir, settings: Settings) -> list[str]:
    """Write run.yaml, or verify that the stored one has the same settings.

    Returns:
        notes on extensions that have changed since the run last used them.

    Raises:
        SettingsError: the folder belongs to a run with other settings.
    """
    path = run_dir.path / RUN_SETTINGS
    if not path.exists():
        _store_extensions(run_dir, settings, {})
        commit_bytes(path, dump_settings(settings).encode())
        return []
    values = _read_values(run_dir.path)
    known = _extensions_of(run_dir.path, values)
    if known.keys() == set(settings.extensions):
        before = with_present_places(run_dir, parse_settings(values, [(str(path), values)]), keep=True)
        stored, now = without_free(before.model_dump()), without_free(settings.model_dump())
        if run_dir.marker("data") is not None:  # its fingerprints tell whether they are the same data
            stored |= {name: now.get(name) for name in _DATA_PLACES}
    else:  # the others may not be imported
        stored, now = {"extensions": list(known)}, {"extensions": settings.extensions}
    differing = [name for name in sorted({*stored, *now}) if stored.get(name) != now.get(name)]
    if differing:
        changes = "; ".join(f"{name} was {stored.get(name)!r} and is now {now.get(name)!r}" for name in differing[:4])
        raise SettingsError(
            f"{run_dir.path} holds a run of other settings ({changes}); continue it with its own by --config {path} "
            f"--set run.dir={run_dir.path}, give this run a folder of its own with --set run.dir=runs/ANOTHER-NAME, or "
            f"delete {run_dir.path} to start over there"
        )
    return _store_extensions(run_dir, settings, known)


def has_begun(run_dir: RunDir) -> bool:
    """Whether the folder holds more than what a command that failed before its first step was done leaves there."""
    if any(run_dir.path.glob("steps/*.json")):
        return True
    names = {path.name for path in run_dir.path.iterdir()} - {"steps"}
    return any(name not in _OF_A_START and not name.startswith((".tmp-", ".staging-")) for name in names)


def write_first_settings(run_dir: RunDir, settings: Settings) -> list[str]:
    """Write run.yaml of a run that has not begun; the caller owns it. Other settings of a failed start are replaced."""
    try:
        return write_or_verify_settings(run_dir, settings)
    except SettingsError:
        for name in (*_DECIDED_AT_START, *_OF_ANOTHER_RUN):
            (run_dir.path / name).unlink(missing_ok=True)
        note = f"note: no step of {run_dir.path} was ever done, so these settings replace those of the earlier start"
        return [note, *write_or_verify_settings(run_dir, settings)]


def keep_name(run_dir: RunDir, settings: Settings, *, started_as: str | None = None) -> Settings:
    """Return the settings with the name that the run has, where the given one follows from its folder alone.

    Args:
        started_as: the name that the same settings have in their default folder, which may have been moved.
    """
    path, run = run_dir.path / RUN_SETTINGS, settings.run
    if run.dir is None or not path.exists():
        return settings
    known = _value(_read_values(run_dir.path), "run", "name")
    if not isinstance(known, str) or (run.name != name_of_folder(run.dir) and known != started_as):
        return settings
    return settings.model_copy(update={"run": run.model_copy(update={"name": known})})


def keep_zero_stage(run_dir: RunDir, settings: Settings) -> Settings:
    """Return the settings with the ZeRO stage that the run's own name, where the given ones leave it open."""
    path, training = run_dir.path / RUN_SETTINGS, settings.training
    if training.zero_stage != "auto" or not path.exists():
        return settings
    known = _value(_read_values(run_dir.path), "training", "zero_stage")
    if type(known) is not int:
        return settings
    return settings.model_copy(update={"training": training.model_copy(update={"zero_stage": known})})


def _store_extensions(run_dir: RunDir, settings: Settings, known: dict[str, str | None]) -> list[str]:
    """Store the sha256 of the extensions that the user's own settings name; returns a note on each that has changed."""
    if not settings.extensions:
        return []
    hashes = {name: sha256_of_module(name) for name in settings.extensions}
    changed = [name for name, sha256 in known.items() if sha256 not in (None, hashes[name])]
    if hashes != known:
        commit_json(run_dir.path / EXTENSIONS, hashes)
    return [
        f"note: the extension {name!r} has changed since this run last used it; finished steps keep what the earlier "
        "one made"
        for name in changed
    ]


def read_run_settings(folder: Path) -> Settings:
    """Read the settings of a run from its folder.

    Raises:
        RunError: the folder contains no run.
        SettingsError: its run.yaml contains no valid settings.
    """
    values = _read_values(folder)
    for name, sha256 in _extensions_of(folder, values).items():
        if not is_loaded(name):
            raise RunError(
                f"{folder} uses the extension {name!r}, code that would be imported; if you trust it, give "
                "--allow-extensions, or in Python call launcher.config.extensions.load_extensions first"
            )
        _verify_extension(folder, name, sha256)
    return parse_settings(values, [(str(folder / RUN_SETTINGS), values)])


def allow_extensions(folder: Path) -> None:
    """Import the extensions of a run, each only if its sha256 is the one that the run was started with.

    Raises:
        RunError: the folder contains no run, or an extension is another one.
    """
    for name, sha256 in _extensions_of(folder, _read_values(folder)).items():
        _verify_extension(folder, name, sha256)
        load_extensions([name])


def _verify_extension(folder: Path, name: str, sha256: str | None) -> None:
    if (found := sha256_of_module(name)) != sha256:
        raise RunError(
            f"{folder} last used another extension {name!r} (sha256 {(sha256 or 'unknown')[:12]}..., now "
            f"{found[:12]}...); restore it, or let the run use the new one: `mmcot run` with the run's own settings"
        )


def _extensions_of(folder: Path, values: dict[str, Any]) -> dict[str, str | None]:
    """The extensions of a run with their sha256 at its first start."""
    names = values.get("extensions")
    if not isinstance(names, list):  # validation names what is no list
        return {}
    path = folder / EXTENSIONS
    stored = read_json(path) if names and path.is_file() else {}
    return {str(name): stored.get(str(name)) for name in names}


def _read_values(folder: Path) -> dict[str, Any]:
    path = folder / RUN_SETTINGS
    if not path.is_file():
        raise RunError(f"{folder} holds no run (no {RUN_SETTINGS}); give the folder of one, such as runs/demo")
    return read_yaml_mapping(
        path,
        remedy=f"restore this file from a copy or by `mmcot config show ... > {path}` with the run's own settings, or "
        f"delete {folder} to start over there",
    )


def _value(values: dict[str, Any], section: str, key: str) -> Any:
    """A value of plain settings; None where there is none."""
    found = values.get(section)
    return found.get(key) if isinstance(found, dict) else None


def settings_of(run_dir: RunDir) -> Settings:
    """Return the settings of a run, with the present places of its folder and of what moved with it.

    Raises:
        RunError: as ``read_run_settings``.
        SettingsError: as ``read_run_settings``.
    """
    settings = with_present_places(run_dir, read_run_settings(run_dir.path))
    return settings.model_copy(update={"run": settings.run.model_copy(update={"dir": str(run_dir.path)})})


def with_present_places(run_dir: RunDir, settings: Settings, *, keep: bool = False) -> Settings:
    """Return the settings with the present places of data and of MLflow's database, if they moved with the run.

    Args:
        keep: keep a place that exists, even if there is one next to the run as well.
    """

    def present(path: str | None) -> str | None:
        return path and place_around(run_dir.path, path, keep=keep)

    data, tracking = settings.data, settings.tracking
    data = data.model_copy(update={"path": present(data.path), "shards_dir": present(data.shards_dir)})
    uri = tracking.uri and uri_around(run_dir.path, tracking.uri, keep=keep)
    return settings.model_copy(update={"data": data, "tracking": tracking.model_copy(update={"uri": uri})})


def of_moved_folder(settings: Settings, config: Path | None, overrides: Sequence[str]) -> Settings:
    """Return the settings with the folder of ``config``, if it is the run.yaml of a run that was moved there."""
    if config is None or config.name != RUN_SETTINGS or not (config.parent / "lock.json").exists():
        return settings
    is_given = any(override.startswith(("run.dir=", "run.name=")) for override in overrides)
    if is_given or (settings.run_dir / RUN_SETTINGS).exists():
        return settings
    return settings.model_copy(update={"run": settings.run.model_copy(update={"dir": str(config.parent)})})


def without_free(values: dict[str, Any]) -> dict[str, Any]:
    """Flatten to dotted names, without the settings that may change between attempts."""
    training = values.get("training", {})
    chooses = training.get("export") == "best" or training.get("early_stopping_patience") is not None
    free = _FREE_SETTINGS - {("training", "validate_every")} if chooses else _FREE_SETTINGS
    return _flatten(values, free)


def _flatten(values: dict[str, Any], free: set[tuple[str, ...]], prefix: tuple[str, ...] = ()) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = (*prefix, key)
        if name in free:
            continue
        if isinstance(value, dict):
            flat |= _flatten(value, free, name)
        else:
            flat[".".join(name)] = value
    return flat
