"""The export of a trained model as a folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from data_shards.atomic_files import commit_folder, commit_json, read_json
from launcher.stages.jobs import MODEL_FACTS_FILE
from launcher.training.checkpoint import write_error
from launcher.training.deepspeed_engine import full_state_dict


def export_model(
    engine: Any, tokenizer: Any, folder: Path, *, facts: dict[str, Any], may_commit: Callable[[], None]
) -> None:
    """Commit the model and tokenizer as a folder that ``from_pretrained`` opens; ``facts`` describe its prompts."""
    state = full_state_dict(engine)
    if dist.get_rank() == 0:
        staging = folder.with_name(".staging-model")
        shutil.rmtree(staging, ignore_errors=True)
        try:
            engine.module.save_pretrained(staging, state_dict=state)
            _set_dtype(staging, state)
            tokenizer.save_pretrained(staging)
            commit_json(staging / MODEL_FACTS_FILE, facts)
            may_commit()
            commit_folder(staging, folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(staging, ignore_errors=True)
            raise write_error("the model", error, folder.parent / "checkpoints") from error
    dist.barrier()


def export_best(best: Path, folder: Path, *, may_commit: Callable[[], None]) -> None:
    """Commit the best model as the exported one; every rank calls it."""
    if dist.get_rank() == 0:
        staging = folder.with_name(".staging-model")
        shutil.rmtree(staging, ignore_errors=True)
        shutil.copytree(best, staging, copy_function=os.link)  # no second copy of the weights
        may_commit()
        commit_folder(staging, folder)
    dist.barrier()


def _set_dtype(folder: Path, state: dict[str, torch.Tensor] | None) -> None:
    """Let config.json name the type of the weights in the folder; the module's is another after a training in bf16."""
    dtypes = {tensor.dtype for tensor in (state or {}).values() if tensor.is_floating_point()}
    if len(dtypes) == 1:
        config = read_json(folder / "config.json") | {"dtype": str(dtypes.pop()).removeprefix("torch.")}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
