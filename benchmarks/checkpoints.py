"""How long a checkpoint stops the training, and what a whole one takes: one rank, a T5 of the base size with fusion.

python benchmarks/checkpoints.py [--out DIR] [--rounds 3] [--tiny]

Interleaved in one run: ours (until the training may go on, and until it is committed), and the same state written by
torch.save in the training's own thread with its sha256, as version 0.1.0 did.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from data_shards.atomic_files import sha256_of_file
from launcher.config.settings import Training
from launcher.training.checkpoint import begin_checkpoint, commit_checkpoint
from launcher.training.deepspeed_engine import build_engine, init_distributed
from mmcot.models.loss import text_objective
from mmcot.models.t5 import T5ForMultimodalGeneration

TINY = {"vocab_size": 100, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
BASE = {"vocab_size": 32128, "d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 12, "num_heads": 12}


def main() -> None:
    """Print a row for each measure, and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a small model, to try the script")
    options = parser.parse_args()
    engine = trained_engine(TINY if options.tiny else BASE | {"feed_forward_proj": "gated-gelu"})
    folder = Path(tempfile.mkdtemp(prefix="checkpoints-"))
    rows: dict[str, list[float]] = {"ours, training stops": [], "ours, until committed": [], "in its own thread": []}
    try:
        for number in range(1, options.rounds + 1):
            started = time.perf_counter()
            pending = begin_checkpoint(engine, folder, step=number, facts={}, may_commit=lambda: None)
            rows["ours, training stops"].append(time.perf_counter() - started)
            commit_checkpoint(pending, keep=1, may_commit=lambda: None)
            rows["ours, until committed"].append(time.perf_counter() - started)
            rows["in its own thread"].append(seconds_in_own_thread(engine, folder / "plain"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    parameters = sum(parameter.numel() for parameter in engine.module.parameters())
    print(f"{parameters:,} parameters, fp32, one rank; seconds: median (each)")
    for name, values in rows.items():
        print(f"{name:<24}{statistics.median(values):6.2f}  ({', '.join(f'{value:.2f}' for value in values)})")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        report = {"parameters": parameters, "torch": torch.__version__, "seconds": rows}
        (options.out / "checkpoints.json").write_text(json.dumps(report, indent=2) + "\n")


def trained_engine(shape: dict[str, Any]) -> Any:
    """An engine after one step, so that the optimizer has its state."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", "29577")
    init_distributed(use_gpu=False)
    vision = {"vision_num_patches": 9, "vision_dim": 64}
    engine = build_engine(
        lambda: T5ForMultimodalGeneration.start(shape, vision, pad_token_id=0, eos_token_id=1),
        Training(zero_stage=1),
        world_size=1,
        random_weights=True,
    )
    ids = torch.ones(2, 8, dtype=torch.long)
    inputs = {
        "input_ids": ids,
        "attention_mask": ids,
        "decoder_input_ids": ids,
        "vision_features": torch.ones(2, 9, 64),
    }
    loss, _ = text_objective(engine, inputs, ids)["text"]
    engine.backward(loss, scale_wrt_gas=False)
    engine.step()
    return engine


def seconds_in_own_thread(engine: Any, folder: Path) -> float:
    """Seconds to write and hash the same files without a thread."""
    copies = engine.checkpoint_engine
    engine.checkpoint_engine = copies._inner
    folder.mkdir(parents=True)
    started = time.perf_counter()
    try:
        engine.save_checkpoint(str(folder), tag="state", save_latest=False)
        for path in folder.rglob("*.pt"):
            sha256_of_file(path)
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        return time.perf_counter() - started
    finally:
        engine.checkpoint_engine = copies
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
