"""How much GPU memory a training takes: the allocator's peaks in real optimizer steps of the product's engine.

    python benchmarks/memory.py --out DIR                      # every combination, into DIR/memory.json
    python benchmarks/memory.py --out DIR --only xl-zero3      # those whose names contain this
    python benchmarks/memory.py --out DIR --compare docs/data/memory.json     # ratios of the peaks

Each combination of model, ZeRO stage, number of GPUs, activation checkpointing and offload is a process of its own and
a file in DIR/parts; those that are there are not run again, unless they failed. One process is rank 0: the other ranks
are pretended by torch's process group "fake", whose collectives move nothing, so one GPU is enough. Weights are not
drawn, features are zeros, and an update is made whatever its norm: no value is meant by it, the shapes are real.

A real GPU has less memory than some combinations take; those are recorded with their error. On a stand-in for a GPU,
whose kernels do nothing and whose memory is never touched, all of them run. What is not in the allocator is not in the
peaks: the context of CUDA, NCCL's buffers and what a fragmented pool keeps beside them.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))  # also without an installation
VISION = {"vision_num_patches": 145, "vision_dim": 1024}  # the presets' ViT features
ROWS = {"base": 8, "large": 2, "xl": 4}  # training.micro_batch_size of the presets
LENGTHS = [(96, 64), (512, 64), (512, 512)]  # typical; the longest of stage two; the longest of stage one
SWEEP = [(8, 96, 64), (8, 256, 128), (8, 512, 64), (8, 512, 512), (1, 512, 512), (16, 512, 128)]
BLOCKS = 2  # of a step: gradients of the first are there when the second is computed
WARM_UP = 2  # steps: Adam's moments are made in the first, ZeRO-3 plans its prefetches in it

TOLERANCE = 0.05  # of a peak compared with a reference


@dataclasses.dataclass(frozen=True)
class Combination:
    """What is measured in one process; ``name`` is that of its file."""

    size: str
    zero_stage: int
    gpus: int
    checkpointing: bool = False
    offload: str = "none"
    trains: str = "all"  # or "lora", with the default adapters

    @property
    def precision(self) -> str:
        """bf16, but fp32 under ZeRO-0, which keeps no fp32 weights beside bf16 ones."""
        return "bf16" if self.zero_stage else "fp32"

    @property
    def name(self) -> str:
        """Such as "xl-zero3-8gpu-checkpointing"."""
        parts = [self.size, f"zero{self.zero_stage}", f"{self.gpus}gpu", *["checkpointing"] * self.checkpointing]
        return "-".join([*parts, *["offload"] * (self.offload != "none"), *["lora"] * (self.trains == "lora")])

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        """Rows, source and target tokens of a block; the sweep where the gradients' share is the clearest."""
        own = [(ROWS[self.size], *lengths) for lengths in LENGTHS]
        return own + [shape for shape in SWEEP if shape not in own] * ((self.zero_stage, self.gpus) == (2, 1))


KEYS = [field.name for field in dataclasses.fields(Combination)]


def combinations() -> Iterator[Combination]:
    for size in ROWS:
        yield Combination(size, 0, 1)
        for stage in (1, 2, 3):
            for gpus in (1, 4, 8):
                yield Combination(size, stage, gpus)
        for stage, gpus in ((1, 1), (2, 1), (3, 8)):
            yield Combination(size, stage, gpus, checkpointing=True)
    yield Combination("base", 1, 1, offload="cpu")
    yield Combination("large", 2, 4, offload="cpu")
    yield Combination("xl", 3, 8, checkpointing=True, offload="cpu")
    for size in ("large", "xl"):
        yield Combination(size, 0, 1, trains="lora")
        yield Combination(size, 1, 1, trains="lora")
        yield Combination(size, 1, 1, checkpointing=True, trains="lora")


# --- one combination, in a process of its own -----------------------------------------------------------------------


def measure(chosen: Combination, shapes: list[tuple[int, int, int]]) -> dict[str, Any]:
    """Build the engine, make some steps, and read the allocator; bytes of rank 0."""
    import torch

    from launcher.config.settings import Training
    from launcher.training.deepspeed_engine import build_engine
    from mmcot.models.device import DTYPES, open_device

    open_device(use_gpu=True, index=0, precision=chosen.precision)
    pretend_group(chosen.gpus)
    settings = Training.model_validate(
        {
            "zero_stage": chosen.zero_stage,
            "precision": chosen.precision,
            "activation_checkpointing": chosen.checkpointing,
            "offload": chosen.offload,
            "trains": chosen.trains,
        }
    )
    with every_norm_accepted():
        dtype = DTYPES[chosen.precision]
        build = functools.partial(new_model, chosen.size, dtype, trains=chosen.trains)
        engine = build_engine(build, settings, world_size=chosen.gpus, random_weights=True)
        built = torch.cuda.memory_allocated()
        found = []
        for number, shape in enumerate(shapes):
            for _ in range(0 if number else WARM_UP):
                step_peaks(engine, shape, chosen.gpus)
            torch.cuda.empty_cache()
            found.append(step_peaks(engine, shape, chosen.gpus))
    if engine.skipped_steps or not has_moments(engine):
        raise RuntimeError(f"DeepSpeed left out {engine.skipped_steps} updates: the peaks are too low")
    module: Any = engine.module
    parameters = sum(getattr(weight, "ds_numel", weight.numel()) for weight in module.parameters())
    return {
        **dataclasses.asdict(chosen),
        "precision": chosen.precision,
        "parameters": parameters,
        "blocks": BLOCKS,
        "built_bytes": built,
        "steady_bytes": found[0]["after_bytes"],
        "shapes": found,
    }


def pretend_group(world_size: int) -> None:
    """Be rank 0 of a group whose other ranks do not exist."""
    import deepspeed
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size)}
    os.environ.setdefault("DS_ACCELERATOR", "cuda")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl", verbose=False, auto_mpi_discovery=False)


@contextmanager
def every_norm_accepted() -> Iterator[None]:
    """DeepSpeed leaves out an update whose norm is not finite or below 0; here values mean nothing."""
    from deepspeed.runtime import bf16_optimizer
    from deepspeed.runtime.zero import stage3

    modules: tuple[Any, ...] = (bf16_optimizer, stage3)  # of ZeRO-1 and ZeRO-3; ZeRO-2 judges no norm in bf16
    judged = [module.is_invalid_grad_norm for module in modules]
    for module in modules:
        module.is_invalid_grad_norm = lambda norm: False
    try:
        yield
    finally:
        for module, function in zip(modules, judged, strict=True):
            module.is_invalid_grad_norm = function


def new_model(size: str, dtype: Any, *, trains: str = "all") -> Any:
    """A preset's model in main memory that nothing is written to: in the precision to which DeepSpeed converts it."""
    import torch
    from transformers import initialization

    from launcher.config.loading import load_settings
    from mmcot.models.lora import add_adapters
    from mmcot.models.t5 import T5ForMultimodalGeneration

    chosen = load_settings(preset=f"scienceqa-{size}").model
    shape = chosen.shape.for_config
    torch.set_default_dtype(dtype)
    try:
        with initialization.no_init_weights():
            model = T5ForMultimodalGeneration.start(shape, VISION, pad_token_id=0, eos_token_id=1)
    finally:
        torch.set_default_dtype(torch.float32)
    model.tie_weights()  # a part of the initialization
    if trains == "lora":
        add_adapters(
            model, rank=chosen.lora_rank, alpha=chosen.lora_alpha, dropout=0.0, targets=chosen.lora_targets, seed=0
        )
    return model


def has_moments(engine: Any) -> bool:
    optimizer = engine.optimizer
    while not getattr(optimizer, "state", None) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return any("exp_avg" in state for state in optimizer.state.values())


def step_peaks(engine: Any, shape: tuple[int, int, int], gpus: int) -> dict[str, Any]:
    """The peaks of an optimizer step: while its blocks are computed, while the weights are updated, and of both."""
    import torch

    from launcher.training.engine_steps import optimizer_step
    from launcher.training.throughput import Meter
    from mmcot.models.loss import OBJECTIVES

    cuda, update, peaks = torch.cuda, engine.step, {}

    def measured_update() -> Any:
        peaks["blocks_bytes"], peaks["before_update_bytes"] = cuda.max_memory_allocated(), cuda.memory_allocated()
        cuda.reset_peak_memory_stats()
        result = update()
        peaks["update_bytes"] = cuda.max_memory_allocated()
        return result

    rows, source, target = shape
    step = blocks(rows, source, target)
    counts = {"tokens": BLOCKS * rows * target, "questions": BLOCKS * rows}
    cuda.reset_peak_memory_stats()
    engine.step = measured_update
    try:
        optimizer_step(
            engine,
            step,
            OBJECTIVES["text"],
            seed=0,
            counts=counts,
            world_size=gpus,
            meter=Meter(peak_flops=1.0),
            observe=False,
        )
    finally:
        engine.step = update
    return {
        "rows": rows,
        "source": source,
        "target": target,
        **peaks,
        "peak_bytes": max(peaks.values()),
        "reserved_bytes": cuda.max_memory_reserved(),
        "after_bytes": cuda.memory_allocated(),
    }


def blocks(rows: int, source: int, target: int) -> Any:
    import torch

    from data_shards.stream import Step
    from launcher.stages.samples import Block

    tokens = torch.ones(rows, source, dtype=torch.long)
    written = torch.ones(rows, target, dtype=torch.long)
    pictures = torch.zeros(rows, VISION["vision_num_patches"], VISION["vision_dim"])
    tensors = {
        "input_ids": tokens,
        "attention_mask": tokens,
        "labels": written,
        "decoder_input_ids": written,
        "vision_features": pictures,
        "vision_mask": torch.ones(pictures.shape[:2], dtype=torch.bool),
    }
    return Step(0, [(number, Block(tensors, ("q",) * rows).pin_memory()) for number in range(BLOCKS)])


def compare(found: list[dict[str, Any]], reference: dict[str, Any]) -> int:
    """Print the peaks relative to another memory.json; returns how many differ by more than ``TOLERANCE``."""
    known = {Combination(**{key: one[key] for key in KEYS}).name: one for one in reference["combinations"]}
    different = 0
    for one in found:
        name = Combination(**{key: one[key] for key in KEYS}).name
        expected = {shape_of(shape): shape["peak_bytes"] for shape in known.get(name, {}).get("shapes", [])}
        for shape in one.get("shapes", []):
            if shape_of(shape) in expected:
                ratio = shape["peak_bytes"] / expected[shape_of(shape)]
                different += abs(ratio - 1) > TOLERANCE
                print(f"{name} {shape_of(shape)}: {ratio:.3f}" + "  DIFFERS" * (abs(ratio - 1) > TOLERANCE))
    return min(different, 125)


def shape_of(shape: dict[str, Any]) -> tuple[int, int, int]:
    return shape["rows"], shape["source"], shape["target"]


# --- all of them ----------------------------------------------------------------------------------------------------


def run(chosen: Combination, parts: Path) -> dict[str, Any]:
    """The result of a combination, from its file or from a new process."""
    path = parts / f"{chosen.name}.json"
    if path.exists() and "error" not in (found := json.loads(path.read_text(encoding="utf-8"))):
        return found
    started = time.perf_counter()
    command = [sys.executable, __file__, "--one", json.dumps(dataclasses.asdict(chosen))]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode == 0:
        found = json.loads(result.stdout.splitlines()[-1])
    else:
        lines = result.stderr.strip().splitlines() or [f"status {result.returncode}"]
        found = {**dataclasses.asdict(chosen), "precision": chosen.precision, "error": lines[-1][:300]}
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"{chosen.name}: {time.perf_counter() - started:.0f} s {found.get('error', '')}", flush=True)
    return found


def machine() -> dict[str, str]:
    command = "import torch; print(torch.cuda.get_device_name(), torch.__version__, sep='\\n')"
    device, torch_version = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, check=True
    ).stdout.splitlines()[-2:]
    commit = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return {
        "device": device,
        "torch": torch_version,
        "transformers": version("transformers"),
        "deepspeed": version("deepspeed"),
        "commit": subprocess.run(commit, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder of memory.json and of the parts")
    parser.add_argument("--only", default="", help="run combinations whose name contains this")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time; 1 on a real GPU")
    parser.add_argument("--compare", type=Path, help="another memory.json: print the ratios of the peaks")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--shape", type=int, nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        chosen = Combination(**options.one)
        print(json.dumps(measure(chosen, [tuple(options.shape)] if options.shape else chosen.shapes)), flush=True)
        os._exit(0)  # a group of pretended ranks has no orderly end
    if not options.out:
        parser.error("--out DIR is needed")
    (options.out / "parts").mkdir(parents=True, exist_ok=True)
    wanted = [chosen for chosen in combinations() if options.only in chosen.name]
    with ThreadPoolExecutor(options.jobs) as pool:
        found = list(pool.map(lambda chosen: run(chosen, options.out / "parts"), wanted))
    lines = ",\n".join(json.dumps(one) for one in found)
    text = f'{{"machine": {json.dumps(machine())},\n"combinations": [\n{lines}\n]}}\n'
    (options.out / "memory.json").write_text(text, encoding="utf-8")
    failed = sum("error" in one for one in found)
    print(f"{len(found)} combinations, {failed} of them failed: {options.out / 'memory.json'}")
    if options.compare:
        return compare(found, json.loads(options.compare.read_text(encoding="utf-8")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
