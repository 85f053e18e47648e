"""How long a checkpoint stops the training, what a whole one takes, and how long it takes to open: one rank, T5-base.

python benchmarks/checkpoints.py [--out DIR] [--rounds 3] [--tiny]

Interleaved in one run, on the state of a T5 of the base size with fusion in fp32 under ZeRO-1:

- saving: ours, until the training may go on and until it is committed, the first one with and without memory that was
  got ahead; the same state by torch.distributed.checkpoint's ``async_save``, which neither hashes nor names its files
  and keeps its memory too; the same files written and hashed in the training's own thread, as version 0.1.0 did;
- opening: ours (verified while it is read); every file hashed and then read again by DeepSpeed, as before; the same
  files by ``torch.load(mmap=True)`` and a copy into tensors that exist, without any verification.

``--out`` writes every number, versions, commit and conditions into ``checkpoints.json``.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import psutil
import torch
import torch.utils.serialization.config as serialization
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import async_save

from data_shards.atomic_files import sha256_of_file
from launcher.config.settings import Training
from launcher.training.checkpoint import begin_checkpoint, commit_checkpoint, reserve_memory
from launcher.training.checkpoint_resume import find_checkpoint, load_state
from launcher.training.checkpoint_writer import HostCopies
from launcher.training.deepspeed_engine import build_engine, init_distributed
from mmcot.models.loss import text_objective
from mmcot.models.t5 import T5ForMultimodalGeneration

TINY = {"vocab_size": 100, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
BASE = {"vocab_size": 32128, "d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 12, "num_heads": 12}
FACTS = {"world_size": 1, "zero_stage": 1, "precision": "fp32", "nvme": False}
OURS, DCP = "ours", "torch.distributed.checkpoint"


def main() -> None:
    """Print a row for each measure, and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a small model, to try the script")
    options = parser.parse_args()
    conditions = describe_conditions()
    engine = trained_engine(TINY if options.tiny else BASE | {"feed_forward_proj": "gated-gelu"})
    folder, rows = Path(tempfile.mkdtemp(prefix="checkpoints-")), {}
    try:
        for _ in range(options.rounds):
            measure_first(engine, folder / "first", rows)
        # Its kept memory: the writer's own cache pins pages, which needs a GPU.
        stager = DefaultStager(StagingOptions(False, False, False, False))
        for number in range(1, options.rounds + 1):
            measure_ours(engine, folder / "ours", number, rows)
            measure_dcp(engine, folder / "dcp", stager, rows)
            add(rows, "in the training's own thread, whole", seconds_in_own_thread(engine, folder / "plain"))
        stager.close()
        del stager
        engine.checkpoint_engine = HostCopies(engine.checkpoint_engine._inner)  # frees the copies' memory
        gc.collect()
        for _ in range(options.rounds):
            measure_opening(engine, folder / "ours", rows)
        size = sum(path.stat().st_size for path in (folder / "ours").glob(f"step-{options.rounds:06d}/state/*"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    parameters = sum(parameter.numel() for parameter in engine.module.parameters())
    print(f"{parameters:,} parameters, fp32, one rank, {size / 1e9:.2f} GB; seconds: median (each)")
    for name, values in rows.items():
        print(f"{name:<52}{statistics.median(values):6.2f}  ({', '.join(f'{value:.2f}' for value in values)})")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        report = {"parameters": parameters, "size_bytes": size, "seconds": rows, **conditions}
        (options.out / "checkpoints.json").write_text(json.dumps(report, indent=2) + "\n")


CODE = (":/mmcot", ":/data_shards", ":/launcher", ":/benchmarks/*.py", ":/pyproject.toml")


def describe_conditions() -> dict[str, Any]:
    """Versions, commit and the state of the machine."""
    commit, changed = (
        subprocess.run(["git", *command], cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
        for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no", "--", *CODE])
    )
    return {
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "python": platform.python_version(),
        "commit": commit or None,
        "has_uncommitted_changes": bool(changed),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": list(os.getloadavg()),
        "memory_available_bytes": psutil.virtual_memory().available,
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def add(rows: dict[str, list[float]], name: str, seconds: float) -> None:
    """Add a measured value to its row."""
    rows.setdefault(name, []).append(seconds)


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


def measure_first(engine: Any, folder: Path, rows: dict[str, list[float]]) -> None:
    """The first checkpoint of a training, with memory that was got ahead and without."""
    copies = engine.checkpoint_engine
    for name in ("ours, first, memory got ahead", "ours, first, memory not got ahead"):
        engine.checkpoint_engine = HostCopies(copies._inner)
        if "not" not in name:
            started = time.perf_counter()
            reserve_memory(engine)
            add(rows, "ours, memory got ahead: training stops", time.perf_counter() - started)
            engine.checkpoint_engine.wait_for_memory()
            add(rows, "ours, memory got ahead: until it is there", time.perf_counter() - started)
        started = time.perf_counter()
        pending = begin_checkpoint(engine, folder, step=1, facts=FACTS, may_commit=lambda: None)
        add(rows, f"{name}: training stops", time.perf_counter() - started)
        commit_checkpoint(pending, keep=1, may_commit=lambda: None)
        engine.checkpoint_engine = copies
        shutil.rmtree(folder)
        gc.collect()


def measure_ours(engine: Any, folder: Path, number: int, rows: dict[str, list[float]]) -> None:
    """A checkpoint of ours, hashed and committed; the memory of the one before is used."""
    started = time.perf_counter()
    pending = begin_checkpoint(engine, folder, step=number, facts=FACTS, may_commit=lambda: None)
    add(rows, f"{OURS}: training stops", time.perf_counter() - started)
    commit_checkpoint(pending, keep=1, may_commit=lambda: None)
    add(rows, f"{OURS}: whole", time.perf_counter() - started)


class _Seen:
    """A checkpoint engine that collects the states that DeepSpeed saves."""

    def __init__(self, inner: Any) -> None:
        self._inner, self.states = inner, {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def preserves_storage_sharing(self) -> bool:
        return False  # no copies, as for ours

    def save(self, state_dict: Any, path: str) -> None:
        self.states[Path(path).name] = state_dict


def measure_dcp(engine: Any, folder: Path, stager: Any, rows: dict[str, list[float]]) -> None:
    """The same state by torch.distributed.checkpoint, in a thread."""
    copies, started = engine.checkpoint_engine, time.perf_counter()
    engine.checkpoint_engine = seen = _Seen(copies._inner)
    try:
        engine.save_checkpoint(str(folder), tag="state", save_latest=False)
        future: Any = async_save(seen.states, checkpoint_id=folder, async_stager=stager, no_dist=True)
        add(rows, f"{DCP}: training stops", time.perf_counter() - started)
        future.result()
        add(rows, f"{DCP}: whole", time.perf_counter() - started)
    finally:
        engine.checkpoint_engine = copies


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


def measure_opening(engine: Any, folder: Path, rows: dict[str, list[float]]) -> None:
    """A committed checkpoint into the engine, three ways; the files are in the system's cache."""
    copies, started = engine.checkpoint_engine, time.perf_counter()
    # A training verifies before it builds its engine, so that its check leaves room for one; here it is built already.
    with mock.patch("launcher.training.checkpoint_files.may_hold", return_value=True):
        found = find_checkpoint(folder, facts=FACTS, may_commit=lambda: None)
    assert found is not None
    load_state(engine, found)
    add(rows, "opening, ours: verified while it is read", time.perf_counter() - started)
    started = time.perf_counter()
    for path in (found.path / "state").iterdir():
        sha256_of_file(path)
    engine.checkpoint_engine = copies._inner
    engine.load_checkpoint(str(found.path), tag="state")
    engine.checkpoint_engine = copies
    add(rows, "opening, before: hashed, then read again", time.perf_counter() - started)
    seconds, targets = 0.0, {}
    for timed in (False, True):  # first to make the tensors that are copied to
        started = time.perf_counter()
        for path in sorted((found.path / "state").glob("*.pt")):
            with serialization.patch({"load.mmap": True}):  # pyright: ignore[reportAttributeAccessIssue]
                state = copies._inner.load(str(path), map_location="cpu")
            for place, tensor in tensors_of(state, path.name):
                if timed:
                    targets[place].copy_(tensor)
                else:
                    targets[place] = torch.zeros_like(tensor)
        seconds = time.perf_counter() - started
    add(rows, "opening, torch.load(mmap=True) and a copy, unverified", seconds)


def tensors_of(state: Any, place: str) -> list[tuple[str, torch.Tensor]]:
    """Every tensor of a state, with its place in it."""
    if isinstance(state, torch.Tensor):
        return [(place, state)]
    if isinstance(state, dict):
        items = list(state.items())
    else:
        items = list(enumerate(state)) if isinstance(state, list | tuple) else []
    return [found for name, each in items for found in tensors_of(each, f"{place}/{name}")]


if __name__ == "__main__":
    main()
