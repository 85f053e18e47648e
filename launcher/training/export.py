"""The export of a trained model as a folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from data_shards.atomic_files import commit_folder, commit_json, link_file, read_json
from launcher.stages.jobs import MODEL_FACTS_FILE
from launcher.training.checkpoint import write_error
from launcher.training.collectives import agreed
from launcher.training.deepspeed_engine import full_state_dict
from mmcot.models.lora import has_adapters, merged_state, save_adapters

ADAPTERS = "adapters"  # the folder in a model's folder, in peft's form


def export_model(
    engine: Any, tokenizer: Any, folder: Path, *, facts: dict[str, Any], may_commit: Callable[[], None]
) -> None:
    """Commit the model and tokenizer as a folder that ``from_pretrained`` opens; ``facts`` describe its prompts.

    Adapters are merged into its weights, and stand alone in ``adapters/`` below it.

    Raises:
        CheckpointError: it could not be written; raised on every rank.
    """
    state, failure = full_state_dict(engine), None
    if dist.get_rank() == 0:
        staging = folder.with_name(".staging-model")
        shutil.rmtree(staging, ignore_errors=True)
        try:
            _save_weights(engine.module, state, staging)
            tokenizer.save_pretrained(staging)
            commit_json(staging / MODEL_FACTS_FILE, facts)
            may_commit()
            commit_folder(staging, folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(staging, ignore_errors=True)
            failure = f"{error}"
    _raise_together(failure, folder)


def export_best(best: Path, folder: Path, *, may_commit: Callable[[], None]) -> None:
    """Commit the best model as the exported one; every rank calls it.

    Raises:
        CheckpointError: it could not be written.
    """
    failure = None
    if dist.get_rank() == 0:
        staging = folder.with_name(".staging-model")
        shutil.rmtree(staging, ignore_errors=True)
        try:
            shutil.copytree(best, staging, copy_function=link_file)
            may_commit()
            commit_folder(staging, folder)
        except OSError as error:
            failure = f"{error}"
    _raise_together(failure, folder)


def _raise_together(failure: str | None, folder: Path) -> None:
    """Wait for rank 0, and raise its failure on every rank."""
    found = agreed(lambda: failure)
    if found is not None:
        raise write_error("the model", found, folder.parent / "checkpoints")


def _save_weights(module: Any, state: dict[str, torch.Tensor] | None, folder: Path) -> None:
    if state is not None and has_adapters(module):
        save_adapters(module, state, folder / ADAPTERS)
        state = merged_state(module, state)
    module.save_pretrained(folder, state_dict=state)
    _set_dtype(folder, state)


def _set_dtype(folder: Path, state: dict[str, torch.Tensor] | None) -> None:
    """Let config.json name the type of the weights in the folder; the module's is another after a training in bf16."""
    dtypes = {tensor.dtype for tensor in (state or {}).values() if tensor.is_floating_point()}
    if len(dtypes) == 1:
        config = read_json(folder / "config.json") | {"dtype": str(dtypes.pop()).removeprefix("torch.")}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
