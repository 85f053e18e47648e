"""Population-based training's hand-over: a trial continues from another trial's checkpoint, with changed settings.

    trials/ab12_00003-from-ab12_00001-40-5c0d91e2/
      handed_over.json               {"trial": "ab12_00001", "step": 40, "changed": {name: [before, now]}, ...}
      rationale/checkpoints/         a copy of that checkpoint

The copy's manifest names the new trial's run and settings in place of the source's, which it keeps under
``handed_over_by``. All else (data, texts, plan, step, sha256 of every file) stays as it was written, so a training that
would read other data or batches refuses it by name, as any other checkpoint.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable
from typing import Any

from data_shards.atomic_files import commit_bytes, commit_folder, commit_json
from data_shards.sealed_json import commit_sealed, read_sealed
from launcher.config.loading import value_of
from launcher.config.settings import Settings
from launcher.runs.checkpoint_names import LATEST, MANIFEST, CheckpointError, as_latest, name_of
from launcher.runs.journal import Journal
from launcher.runs.run_dir import RunDir
from launcher.runs.run_settings import read_run_settings
from launcher.stages.jobs import HANDED_OVER
from launcher.training.identity import settings_content


def hand_over(
    source: RunDir, target: RunDir, *, step: int, stage: str, settings: Settings, names: Iterable[str]
) -> str:
    """Copy the checkpoint of a step to another trial, as its latest; returns a sentence on it, for people.

    Args:
        settings: of the trial that gets it.
        names: of the settings that the tuning may change.

    Raises:
        CheckpointError: the checkpoint is not one that the source's training wrote.
    """
    own, name = source.checkpoints(stage) / name_of(step), name_of(step)
    before = read_run_settings(source.path)
    manifest = _verified(source, stage, step, settings_content(before))
    values = {name: [value_of(before, name), value_of(settings, name)] for name in sorted(names)}
    origin = {
        "trial": source.path.name,
        "step": step,
        "changed": {name: [old, new] for name, (old, new) in values.items() if old != new},
        **{fact: manifest.pop(fact) for fact in ("run_id", "settings_fingerprint") if fact in manifest},
    }
    manifest.pop("best", None)  # the best model's files in the source's object store
    facts = {"run_id": target.identity(), "settings_fingerprint": settings_content(settings)}
    folder = target.checkpoints(stage)
    staging = folder.with_name(f".staging-{folder.name}")
    shutil.rmtree(staging, ignore_errors=True)
    shutil.copytree(own, staging / name, ignore=shutil.ignore_patterns(".*"))
    commit_sealed(staging / name / MANIFEST, {**manifest, **facts, HANDED_OVER: origin})
    commit_bytes(staging / LATEST, as_latest(name))
    note = describe_hand_over(target, origin)
    with contextlib.closing(Journal(target.journal(stage))) as journal:
        journal.note(step, note)
    commit_json(target.handed_over, {**origin, "note": note})
    commit_folder(staging, folder)
    return note


def describe_hand_over(target: RunDir, origin: dict[str, Any]) -> str:
    """Which trial's checkpoint was given to which trial, and what changed, as a sentence."""
    changes = [f"{name} {_text(new)} instead of {_text(old)}" for name, (old, new) in origin["changed"].items()]
    return (
        f"the checkpoint of trial {origin['trial']} at step {origin['step']:,} was handed to trial {target.path.name}, "
        f"with {', '.join(changes) or 'the same settings'}"
    )


def _verified(source: RunDir, stage: str, step: int, settings_fingerprint: str) -> dict[str, Any]:
    """The manifest of a trial's checkpoint: whole, of this step, and of the trial's own id and settings.

    What a checkpoint of an earlier version does not name is not compared.
    """
    path = source.checkpoints(stage) / name_of(step)
    try:
        manifest = read_sealed(path / MANIFEST, remedy="no trial can continue from it")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{error}") from error
    expected = {"step": step, "run_id": source.identity(), "settings_fingerprint": settings_fingerprint}
    for name, value in expected.items():
        if manifest.get(name, value) != value:
            raise CheckpointError(
                f"{path} was written with {name} = {manifest[name]!r}, trial {source.path.name} has {value!r}; it is "
                "not handed to another trial"
            )
    return manifest


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value}"
