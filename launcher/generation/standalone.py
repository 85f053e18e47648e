"""Rationales without a run: any exported model over any data folder, in shards, by the same task queue.

    mmcot rationales --model runs/demo/rationale/model --shards data/mine --split all --out rationales/

The prompt's format and limits are those the model was trained with (``mmcot.json`` in its
folder); ``--set rationale.format=...`` gives them for a model without that file.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_shards.atomic_files import fingerprint, sha256_of_file
from data_shards.generated_texts import verified_files
from data_shards.json_shapes import Whole, read_record
from data_shards.mirror import local_folder
from data_shards.sources.question_set import SPLITS
from launcher.cluster.gpus import with_device
from launcher.cluster.ray_session import ray_session
from launcher.config.chains import ANSWER, RATIONALE
from launcher.config.loading import merge_override, parse_settings
from launcher.config.settings import Settings, SettingsError
from launcher.generation.inputs import generation_inputs
from launcher.generation.task_lines import describe_summary
from launcher.generation.text_tasks import write_split_texts
from launcher.runs.exported import verify_model
from launcher.runs.progress import GenerationLine
from launcher.runs.signals import sigterm_stops
from launcher.stages.data_folder import open_data
from launcher.stages.jobs import MODEL_FACTS_FILE, GenerationJob, model_facts


def write_rationales(
    model_dir: Path,
    shards: str,
    split: str,
    out: Path,
    *,
    overrides: Sequence[str] = (),
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Write the missing rationales of a split, or of all; returns the counts.

    Raises:
        SettingsError: the folder holds no model, or no description of its prompts.
        GenerationError: tasks were quarantined; the others' files are committed.
        ShardError: ``out`` holds rationales of another model, data or settings.
        Stopped: a stop was requested (SIGTERM, Ctrl-C, SIGHUP); the same command resumes.
    """
    settings = _settings(model_dir, overrides)
    if split == "all":
        folder = open_data(
            settings.data, local_folder(shards, settings.data.cache_dir, features=settings.data.features)
        )
        splits = [name for name in SPLITS if folder.text["num_samples"][name]]
    else:
        splits = [split]
    return write_model_texts(settings, RATIONALE, model_dir, shards, splits, out, report=report)


def write_model_texts(
    settings: Settings,
    stage: str,
    model_dir: Path,
    shards: str,
    splits: Sequence[str],
    out: Path,
    *,
    texts: Mapping[str, Path] | None = None,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Write a model's missing texts for some splits; returns the counts.

    Args:
        stage: whose format and limits in ``settings`` the model has.
        texts: the folders of the texts that the stage reads, by their names.

    Raises:
        As ``write_rationales``.
    """
    settings = with_device(settings, None, report)
    verify_model(model_dir)
    folder = open_data(settings.data, local_folder(shards, settings.data.cache_dir, features=settings.data.features))
    weights = sorted(model_dir.glob("*.safetensors"))
    inputs = {
        "model": [sha256_of_file(path) for path in weights],
        **folder.fingerprints(),
        "splits": list(splits),
        **model_facts(settings, stage),
        **generation_inputs(settings),
        **{name: fingerprint(verified_files(folder)) for name, folder in (texts or {}).items()},
    }
    job = GenerationJob(
        stage=stage,
        settings=settings,
        model_dir=str(model_dir.absolute()),
        shards_dir=folder.location,
        output_dir=str(out.absolute()),
        texts={name: str(folder.absolute()) for name, folder in (texts or {}).items()},
    )
    with sigterm_stops(), contextlib.ExitStack() as resources:
        _, summary = write_split_texts(
            job,
            splits,
            inputs,
            report=GenerationLine(report).show,
            say=report,
            open_ray=lambda: resources.enter_context(ray_session(settings.cluster)),
        )
    report(describe_summary(summary))
    return summary


_REMEDY = "restore it, or export the model again"
_FACTS = {
    "format?": str,
    "max_source_tokens?": Whole(1),
    "max_target_tokens?": Whole(1),
    "use_caption?": bool,
    "features?": (str, None),
}


def _settings(model_dir: Path, overrides: Sequence[str]) -> Settings:
    if not list(model_dir.glob("*.safetensors")):
        raise SettingsError(
            f"--model {model_dir} holds no .safetensors; give the folder of a model, such as runs/demo/rationale/model"
        )
    path = model_dir / MODEL_FACTS_FILE
    facts = read_record(path, _FACTS, remedy=_REMEDY) if path.exists() else {}
    prompts = {name: facts[name] for name in ("format", "max_source_tokens", "max_target_tokens") if name in facts}
    values: dict[str, Any] = {
        RATIONALE: {"num_steps": 1, **prompts},
        ANSWER: {"num_steps": 1},
        "data": {name: facts[name] for name in ("use_caption", "features") if name in facts},
    }
    for override in overrides:
        values = merge_override(values, override)
    if not facts and "format" not in values[RATIONALE]:
        raise SettingsError(
            f"{model_dir} has no {MODEL_FACTS_FILE}; give --set rationale.format=QCM-E (or what it was trained with)"
        )
    try:
        return parse_settings(values)
    except SettingsError as error:
        if overrides or not facts:
            raise
        raise SettingsError(f"{path}: {error}; {_REMEDY}") from None
