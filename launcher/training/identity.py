"""The run that a checkpoint belongs to: its id, and fingerprints of its settings and of its data.

    {"run_id": "5f0c...", "settings_fingerprint": "9a...", "data_fingerprint": "77...",
     "rationales_fingerprint": "c1..."}

These facts are in every checkpoint's manifest and decide its folder in an object store. They
depend on content, not on paths: the same data built on another machine, or moved, has the same
fingerprint. The store's folder of a run holds ``run.json``, which names its only writer:

    {"run_id": "5f0c...", "run_dir": "host-a:/data/runs/demo"}
"""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_shards.atomic_files import fingerprint, read_json
from data_shards.json_shapes import read_record
from data_shards.mirror import local_folder
from data_shards.remote_files import put_bytes, read_file
from launcher.config.loading import read_deepspeed
from launcher.config.settings import Settings
from launcher.runs.checked_files import sha256_of_unchanged
from launcher.runs.checkpoint_names import MANIFEST, checkpoints_by_step
from launcher.runs.run_dir import RunDir, RunError
from launcher.runs.run_settings import without_free
from launcher.stages.data_folder import DataFolder, open_data
from launcher.stages.jobs import TrainJob

# Paths of content; the content itself is in the data's fingerprint.
_PLACES = {"data.path", "data.shards_dir", "data.captions", "data.vision_features", "data.vision_model"}
_EARLIER_ZERO_STAGE = 2  # the default of version 0.1, whose fingerprints do not contain it
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)


def run_facts(settings: Settings, folder: DataFolder, run_id: str, *, texts: Mapping[str, str]) -> dict[str, Any]:
    """The facts of a stage's checkpoints.

    Args:
        texts: the folders of the texts that the stage reads, by their names.
    """
    facts: dict[str, Any] = {
        "run_id": run_id,
        "settings_fingerprint": settings_content(settings),
        "data_fingerprint": data_content(settings, folder),
    }
    contents = [_texts_content(folder) for folder in texts.values()]
    if contents:
        facts["rationales_fingerprint"] = contents[0] if len(contents) == 1 else fingerprint(contents)
    return facts


def facts_of_job(job: TrainJob) -> dict[str, Any]:
    """The facts of a job file that has none, written by an earlier version or by hand."""
    settings, run_dir = job.settings, RunDir(Path(job.run_dir))
    folder = open_data(
        settings.data, local_folder(job.shards_dir, settings.data.cache_dir, features=settings.data.features)
    )
    facts = run_facts(settings, folder, settle_identity(run_dir, settings, folder), texts=job.texts)
    if root := store_root(settings, facts):
        claim_store(root, run_dir, facts["run_id"])
    return facts


def settings_content(settings: Settings) -> str:
    """A fingerprint of the settings that results depend on, with the content of the files that they name.

    Values at their default are left out, so that a setting added by a later version does not change it.
    """
    values = {
        name: value
        for name, value in without_free(settings.model_dump(exclude_defaults=True)).items()
        if name not in _PLACES
    }
    values = {name: value for name, value in values.items() if not name.startswith("training.deepspeed")}
    if values.get("training.zero_stage") == _EARLIER_ZERO_STAGE:
        del values["training.zero_stage"]
    values["training.deepspeed"] = read_deepspeed(settings.training.deepspeed)
    if settings.given_texts is not None:
        values["answer.rationales"] = _texts_content(settings.given_texts)
    pretrained = settings.model.pretrained
    if pretrained is not None and Path(pretrained).is_dir():
        weights = sorted(path.name for pattern in ("*.safetensors", "*.bin") for path in Path(pretrained).glob(pattern))
        values["model.pretrained"] = _files_content(Path(pretrained), ("config.json", *weights))
    return fingerprint(values)


def data_content(settings: Settings, folder: DataFolder) -> str:
    """A fingerprint of texts, features and tokenizer, which does not depend on their paths."""
    pretrained = settings.model.pretrained
    if pretrained is None:
        tokenizer = fingerprint(read_json(folder.path / "tokenizer" / "tokenizer.json"))
    else:
        tokenizer = _files_content(Path(pretrained), _TOKENIZER_FILES) if Path(pretrained).is_dir() else pretrained
    features = folder.features
    return fingerprint(
        {
            "text": _shards_content(folder.text),
            "features": [settings.data.features, features["num_patches"], features["dim"], _shards_content(features)]
            if features
            else None,
            "tokenizer": tokenizer,
        }
    )


def store_root(settings: Settings, facts: Mapping[str, Any]) -> str | None:
    """The folder of this run's checkpoints in the object store; None where no store is set."""
    if settings.training.checkpoint_url is None:
        return None
    url, name = settings.training.checkpoint_url.rstrip("/"), settings.run.name
    return f"{url}/{name}-{facts['settings_fingerprint']}-{facts['data_fingerprint']}"


def settle_identity(run_dir: RunDir, settings: Settings, folder: DataFolder) -> str:
    """Fix the run's id before its first use: the folder's own, else the id of the checkpoints it resumes from.

    An empty run folder takes the id in the store's folder for the same name, settings and data.
    """
    if not run_dir.has_identity():
        found = _id_of_checkpoints(run_dir, settings.chain.stage_names)
        if found is None and settings.training.checkpoint_url is not None:
            facts = {
                "settings_fingerprint": settings_content(settings),
                "data_fingerprint": data_content(settings, folder),
            }
            root = store_root(settings, facts)
            if root is not None and (writer := _writer(root)) is not None:
                found = writer["run_id"]
        if found is not None:
            run_dir.take_identity(found)
    return run_dir.identity()


def claim_store(root: str, run_dir: RunDir, run_id: str) -> str | None:
    """Claim the store's folder for this run; returns a note if another run folder wrote there with the same id.

    Raises:
        RunError: the folder belongs to another run.
    """
    check_writer(root, run_id)
    current, place = _writer(root), f"{socket.gethostname()}:{run_dir.path.absolute()}"
    if current is None or current["run_dir"] != place:
        put_bytes((json.dumps({"run_id": run_id, "run_dir": place}) + "\n").encode(), f"{root}/run.json")
        check_writer(root, run_id)  # another run may have claimed it at the same time
    if current is None or current["run_dir"] == place:
        return None
    return (
        f"{root} was last written from {current['run_dir']}, by the same run; if a process is still running there, "
        "end it: two must not write one run"
    )


def check_writer(root: str, run_id: str) -> None:
    """Raise RunError if the store's folder belongs to another run."""
    current = _writer(root)
    if current is not None and current["run_id"] != run_id:
        raise RunError(another_run(root, current["run_id"], run_id))


def another_run(place: str, current: str, own: str) -> str:
    """The error message for checkpoints of another run."""
    return (
        f"{place} holds checkpoints of another run of the same name, settings and data (id {current}, this run's is "
        f"{own}); give this run another run.name or another training.checkpoint_url, or delete {place} if no "
        "run needs it"
    )


def _writer(root: str) -> dict[str, Any] | None:
    try:
        text = read_file(f"{root}/run.json")
    except FileNotFoundError:
        return None
    try:
        value = json.loads(text)
        return {"run_id": str(value["run_id"]), "run_dir": str(value["run_dir"])}
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(
            f'{root}/run.json is not valid ({error!r}), expected {{"run_id": ..., "run_dir": ...}}; '
            f"restore it, or delete {root}"
        ) from None


def _id_of_checkpoints(run_dir: RunDir, stages: Sequence[str]) -> str | None:
    """The id in the newest local checkpoint: logs/, which holds the id, may have been deleted."""
    for stage in reversed(stages):
        for path in reversed(checkpoints_by_step(run_dir.checkpoints(stage))):
            try:
                found = read_record(path / MANIFEST, {"run_id?": str}).get("run_id")
            except (OSError, ValueError):
                continue  # damaged: loading it reports that
            if found is not None:
                return found
    return None


def _shards_content(manifest: Mapping[str, Any]) -> list[list[Any]]:
    """The content of shards; a manifest's own fingerprint also covers the paths of indexed tars."""
    return [[shard["split"], shard["num_samples"], shard["sha256"]] for shard in manifest["shards"]]


def _texts_content(folder: str | Path) -> str | None:
    """A fingerprint of a finished folder of texts; None where there is none, which its reader reports."""
    path = Path(folder) / "manifest.json"
    return fingerprint(read_record(path, dict).get("files")) if path.is_file() else None


def _files_content(folder: Path, names: tuple[str, ...]) -> str:
    return fingerprint({name: sha256_of_unchanged(folder / name) for name in names if (folder / name).is_file()})
