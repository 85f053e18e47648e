"""The export of a trained model as a folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from data_shards.atomic_files import commit_folder, commit_json
from launcher.stages.jobs import MODEL_FACTS_FILE
from launcher.training.deepspeed_engine import full_state_dict


def export_model(
    engine: Any, tokenizer: Any, folder: Path, *, facts: dict[str, Any], may_commit: Callable[[], None]
) -> None:
    """Commit the model and tokenizer as a folder that ``from_pretrained`` opens; ``facts`` describe its prompts."""
    state = full_state_dict(engine)
    if dist.get_rank() == 0:
        staging = folder.with_name(".staging-model")
        shutil.rmtree(staging, ignore_errors=True)
        engine.module.save_pretrained(staging, state_dict=state)
        tokenizer.save_pretrained(staging)
        commit_json(staging / MODEL_FACTS_FILE, facts)
        may_commit()
        commit_folder(staging, folder)
    dist.barrier()
