"""Checks and measurements on a GPU with the product's own code: one JSON a part, written when the part ends.

    python benchmarks/gpu_proof.py --out DIR                  # on the GPU of this machine, some minutes
    python benchmarks/gpu_proof.py --out DIR --size tiny      # every part at a tiny size, also on a CPU

Needs torch, transformers and deepspeed; neither Ray nor MLflow nor a network. Parts:

    ceilings    matrix products, copies and launches: the reference of the other parts
    golden      states, logits, loss and gradients in fp32 and bf16 compared with float64 on the CPU
    attention   the kernel of every attention, cuDNN's on and off, new shapes, NaN in gradients
    training    an optimizer step of base and large: seconds, launches, MFU, peak memory
    decoding    captured graphs, plain CUDA and CPU write the same ids; tokens/s compared with the memory bandwidth

A failed part writes its traceback to its JSON and the others run. ``checks`` contains what must be true; the exit
status is the number of checks that failed.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))  # also without an installation
from mmcot.models.device import open_device
from mmcot.models.flops import BACKWARD_AND_FORWARD, forward_flops, measure_peak_flops
from mmcot.models.loss import OBJECTIVES, token_loss_sum
from mmcot.models.t5 import MultimodalT5Config, T5ForMultimodalGeneration

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
TINY_SHAPE = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 128}
SHAPES = {  # rows of a block, source and target tokens
    "base": [(8, 96, 64), (8, 256, 128), (16, 512, 128)],
    "large": [(2, 96, 64), (8, 96, 64), (8, 256, 128)],
    "tiny": [(2, 12, 8)],
}
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}  # relative, of states and logits
SDP_OPS = "aten::_scaled_dot_product_"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", choices=["full", "tiny"], default="full")
    parser.add_argument("--part", action="append", choices=list(PARTS), help="run only these")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    failed = 0
    for name in options.part or PARTS:
        started = time.perf_counter()
        try:
            result = PARTS[name](options.size == "tiny")
        except Exception:
            result = {"error": traceback.format_exc(), "checks": {"the part runs to its end": False}}
        result = {"part": name, "machine": machine(), "seconds": round(time.perf_counter() - started, 1), **result}
        (options.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        wrong = [check for check, holds in result.get("checks", {}).items() if not holds]
        failed += len(wrong)
        print(
            f"{name}: {result['seconds']} s, {len(result.get('checks', {})) - len(wrong)} checks passed"
            + "".join(f"\n  FAILED: {check}" for check in wrong),
            flush=True,
        )
        gc.collect()
        if ON_GPU:
            torch.cuda.empty_cache()
    return min(failed, 125)


def machine() -> dict[str, Any]:
    commit = (
        os.environ.get("MMCOT_COMMIT")
        or subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
        ).stdout.strip()
    )
    card = torch.cuda.get_device_name() if ON_GPU else platform.processor() or platform.machine()
    return {
        "device": card,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit,
        "python": platform.python_version(),
    }


# --- ceilings ---------------------------------------------------------------------------------------------------------


def ceilings(tiny: bool) -> dict[str, Any]:
    """Operations and bytes a second, and the cost of a launch."""
    source = torch.randn((1 << 20) if tiny else (1 << 28), device=DEVICE)
    target = torch.empty_like(source)
    copy_s = seconds_of(lambda: target.copy_(source), 10)
    small = torch.zeros(16, device=DEVICE)

    def launch_often() -> None:
        for _ in range(1000):
            small.add_(1.0)

    return {
        "matmul_bf16_tflops": measure_peak_flops(DEVICE, torch.bfloat16) / 1e12,
        "matmul_fp32_tflops": measure_peak_flops(DEVICE, torch.float32) / 1e12,
        "copy_gigabytes_per_s": 2 * source.numel() * source.element_size() / copy_s / 1e9,
        "launch_us": seconds_of(launch_often, 3) / 1000 * 1e6,
        "checks": {},
    }


def seconds_of(run: Callable[[], Any], times: int) -> float:
    """The median time of some runs after a warm-up run."""
    run()
    taken = []
    for _ in range(times):
        synchronize()
        started = time.perf_counter()
        run()
        synchronize()
        taken.append(time.perf_counter() - started)
    return float(np.median(taken))


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


# --- golden -----------------------------------------------------------------------------------------------------------


def golden(tiny: bool) -> dict[str, Any]:
    """The two styles of T5 with fusion, masks and missing pictures, compared with float64 on the CPU."""
    errors: dict[str, dict[str, float]] = {}
    shape = (
        TINY_SHAPE
        if tiny
        else {"d_model": 256, "d_kv": 32, "d_ff": 512, "num_layers": 4, "num_heads": 8, "vocab_size": 1000}
    )
    for style, form in {
        "relu, tied": {},
        "gated-gelu, untied": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    }.items():
        reference = new_model({**shape, **form}, patches=(7, 12)).double()
        batch = random_batch(reference.config, rows=5, source=200, target=60)
        expected = outputs_of(reference, batch)
        for precision, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16}.items():
            model = new_model({**shape, **form}, patches=(7, 12)).to(DEVICE, dtype)
            found = outputs_of(model, {name: tensor.to(DEVICE) for name, tensor in batch.items()})
            errors[f"{style}, {precision}"] = {name: relative_error(found[name], expected[name]) for name in expected}
    checks = {
        f"{name}: {what} within {TOLERANCE[name[-4:]]:g} of float64": error[what] <= TOLERANCE[name[-4:]]
        for name, error in errors.items()
        for what in ("encoder", "logits", "loss")
    }
    return {"relative_errors": errors, "checks": checks}


def new_model(shape: dict[str, Any], *, patches: tuple[int, int], seed: int = 0) -> T5ForMultimodalGeneration:
    torch.manual_seed(seed)
    config = MultimodalT5Config(
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        vision_num_patches=patches[0],
        vision_dim=patches[1],
        **{**shape, "dropout_rate": 0.0},
    )
    return T5ForMultimodalGeneration._from_config(config).eval()


def random_batch(
    config: MultimodalT5Config, *, rows: int, source: int, target: int, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Rows of different lengths, the first one full; every third has no picture."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(max(1, source // 3), source + 1, (rows,), generator=generator)
    target_lengths = torch.randint(max(1, target // 3), target + 1, (rows,), generator=generator)
    lengths[0], target_lengths[0] = source, target
    mask, written = (
        torch.arange(width) < given[:, None] for width, given in ((source, lengths), (target, target_lengths))
    )
    vision = torch.randn(rows, config.vision_num_patches, config.vision_dim, generator=generator)
    vision[2::3] = 0.0
    labels = torch.where(written, torch.randint(2, config.vocab_size, (rows, target), generator=generator), -100)
    return {
        "input_ids": torch.randint(2, config.vocab_size, (rows, source), generator=generator) * mask,
        "attention_mask": mask.long(),
        "vision_features": vision,
        "labels": labels,
    }


def outputs_of(model: T5ForMultimodalGeneration, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    inputs = {**batch, "vision_features": batch["vision_features"].to(model.dtype)}
    labels, mask = inputs.pop("labels"), batch["attention_mask"].bool()
    states = model.encoder(**inputs).last_hidden_state
    logits = model(**inputs, decoder_input_ids=model._shift_right(labels), use_cache=False).logits
    loss = token_loss_sum(logits, labels) / (labels != -100).sum()
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    flat = torch.cat([gradient.double().cpu().flatten() for gradient in gradients if gradient is not None])
    return {"encoder": states[mask], "logits": logits[labels != -100], "loss": loss, "gradients": flat}


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((found - expected).norm() / expected.norm())


# --- attention --------------------------------------------------------------------------------------------------------


def attention(tiny: bool) -> dict[str, Any]:
    """The kernels of the model's attention, the cost of new shapes, and whether gradients are finite."""
    shape = TINY_SHAPE if tiny else {**shape_of("base"), "num_layers": 2}
    model = new_model(shape, patches=(145, 1024) if not tiny else (7, 12)).to(DEVICE)
    result: dict[str, Any] = {}
    for name, cudnn in {"as the product runs": None, "cuDNN on": True, "cuDNN off": False}.items():
        if cudnn is None:
            open_device(use_gpu=ON_GPU)
        else:
            torch.backends.cuda.enable_cudnn_sdp(cudnn)
        result[name] = {
            "kernels_fp32": attention_kernels(model.float()),
            "kernels_bf16": attention_kernels(model.bfloat16()),
            "new_shapes_s": seconds_of_new_shapes(model, 2 if tiny else 20),
            "nan_gradients": nan_gradients(tiny),
        }
    open_device(use_gpu=ON_GPU)
    product = result["as the product runs"]
    checks = {
        "the product never takes cuDNN's attention": not any(
            "cudnn" in kernel for kind in ("kernels_fp32", "kernels_bf16") for kernel in product[kind]
        ),
        "the product's gradients of masked attention are finite": not product["nan_gradients"],
    }
    return {**result, "checks": checks}


def attention_kernels(model: T5ForMultimodalGeneration) -> dict[str, int]:
    """Attention operators of a training pass and of an encoder pass without gradients, with their calls."""
    batch = {
        name: tensor.to(DEVICE) for name, tensor in random_batch(model.config, rows=4, source=96, target=64).items()
    }
    batch["vision_features"] = batch["vision_features"].to(model.dtype)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(**batch).loss.backward()
        with torch.inference_mode():
            model.encoder(**{name: tensor for name, tensor in batch.items() if name != "labels"})
    return dict(
        Counter(event.name.removeprefix(SDP_OPS) for event in profile.events() if event.name.startswith(SDP_OPS))
    )


def seconds_of_new_shapes(model: T5ForMultimodalGeneration, count: int) -> float:
    """A forward and a backward pass over blocks of new lengths, after a warm-up block."""
    batches = [
        random_batch(model.config, rows=4, source=97 + 3 * number, target=33 + number, seed=number)
        for number in range(count + 1)
    ]
    started = 0.0
    for number, batch in enumerate(batches):
        moved = {name: tensor.to(DEVICE) for name, tensor in batch.items()}
        moved["vision_features"] = moved["vision_features"].to(model.dtype)
        model(**moved).loss.backward()
        if number == 0:
            synchronize()
            started = time.perf_counter()
    synchronize()
    return time.perf_counter() - started


def nan_gradients(tiny: bool) -> list[str]:
    """Lengths at which a masked attention in bf16 has gradients that are not finite."""
    found = []
    for length in (64,) if tiny else (64, 96, 128, 192, 320, 448):
        torch.manual_seed(length)
        query, key, value = (
            torch.randn(4, 12, length, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
        )
        mask = torch.zeros(4, 1, length, length, device=DEVICE, dtype=torch.bfloat16)
        mask[1, ..., length // 2 :] = float("-inf")
        torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=1.0).sum().backward()
        if not all(torch.isfinite(tensor.grad).all() for tensor in (query, key, value)):
            found.append(str(length))
    return found


# --- training ---------------------------------------------------------------------------------------------------------


def training(tiny: bool) -> dict[str, Any]:
    """The product's own optimizer step on one device, bf16 on a GPU, with DeepSpeed's ZeRO-1."""
    peak = measure_peak_flops(DEVICE, torch.bfloat16 if ON_GPU else torch.float32)
    rows = []
    with one_rank():
        for size in ("tiny",) if tiny else ("base", "large"):
            rows += [{"model": size, **row} for row in training_steps(size, peak)]
    return {
        "peak_tflops": peak / 1e12,
        "steps": rows,
        "checks": {"every loss is finite": all(np.isfinite(row["loss"]) for row in rows)},
    }


@contextlib.contextmanager
def one_rank() -> Iterator[None]:
    """Open a process group of this process alone."""
    from launcher.training.deepspeed_engine import init_distributed

    sys.modules.setdefault("mlflow", None)  # DeepSpeed imports it if it can
    os.environ.setdefault("DS_ACCELERATOR", DEVICE.type)
    for name, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29571",
    }.items():
        os.environ.setdefault(name, value)
    init_distributed(use_gpu=ON_GPU)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def shape_of(size: str) -> dict[str, Any]:
    from launcher.config.loading import load_settings

    if size == "tiny":
        return TINY_SHAPE
    return load_settings(preset=f"scienceqa-{size}").model.shape.for_config


def training_steps(size: str, peak: float) -> Iterator[dict[str, Any]]:
    """A row for each shape: two blocks a step, after two warm-up steps."""
    from data_shards.stream import Step
    from launcher.config.settings import Training
    from launcher.stages.samples import Block
    from launcher.training.deepspeed_engine import build_engine
    from launcher.training.engine_steps import optimizer_step
    from launcher.training.throughput import Meter

    settings = Training(zero_stage=1, precision="bf16" if ON_GPU else "fp32", learning_rate=1e-5)
    patches = (145, 1024) if size != "tiny" else (7, 12)
    engine = build_engine(
        lambda: new_model(shape_of(size), patches=patches).float(), settings, world_size=1, random_weights=True
    )
    for rows, source, target in SHAPES[size]:
        batches = [
            random_batch(engine.module.config, rows=rows, source=source, target=target, seed=seed) for seed in range(2)
        ]
        tokens = sum(int((batch["labels"] != -100).sum()) for batch in batches)
        batches = [batch | {"decoder_input_ids": engine.module._shift_right(batch["labels"])} for batch in batches]
        step = Step(
            0,
            [
                (index, Block(batch, ("q",)).pin_memory() if ON_GPU else Block(batch, ("q",)))
                for index, batch in enumerate(batches)
            ],
        )
        flops = sum(
            forward_flops(
                engine.module.config,
                batch["attention_mask"].sum(1).tolist(),
                (batch["labels"] != -100).sum(1).tolist(),
                num_patches=patches[0],
            )
            for batch in batches
        )
        losses = []

        def run(step: Step = step, tokens: int = tokens, losses: list[float] = losses) -> None:
            counts = {"tokens": tokens, "questions": len(step.blocks)}
            options = {"seed": 0, "counts": counts, "world_size": 1, "meter": Meter(peak_flops=peak), "observe": False}
            losses.append(optimizer_step(engine, step, OBJECTIVES["text"], **options)["text"])

        run()
        if ON_GPU:
            torch.cuda.reset_peak_memory_stats()
        taken = seconds_of(run, 5)
        yield {
            "rows": rows,
            "source": source,
            "target": target,
            "blocks": len(batches),
            "seconds": taken,
            "loss": losses[-1],
            "mfu": BACKWARD_AND_FORWARD * flops / taken / peak,
            "tokens_per_s": 2 * rows * (source + target) / taken,
            **({"peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9, **launches_of(run)} if ON_GPU else {}),
        }


def launches_of(run: Callable[[], Any]) -> dict[str, Any]:
    """Kernel launches, host-device copies and waits of a run, and the share of its time in which kernels ran."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        started = time.perf_counter()
        run()
        synchronize()
        wall = time.perf_counter() - started
    names = Counter(event.name for event in profile.events())
    kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return {
        "launches": sum(count for name, count in names.items() if "LaunchKernel" in name or name == "cudaGraphLaunch"),
        "copies": names["cudaMemcpyAsync"],
        "waits": names["cudaStreamSynchronize"] + names["cudaDeviceSynchronize"] + names["cudaEventSynchronize"],
        "busy_share_profiled": sum(event.time_range.elapsed_us() for event in kernels) / 1e6 / wall,
    }


# --- decoding ---------------------------------------------------------------------------------------------------------


def decoding(tiny: bool) -> dict[str, Any]:
    """Equal ids on every route in fp32, and tokens a second in bf16 compared with the bound of the memory bandwidth."""
    source = torch.empty(1 << (20 if tiny else 28), device=DEVICE)
    copy_s = seconds_of(source.clone, 5)
    bandwidth = 2 * source.numel() * source.element_size() / copy_s
    del source
    ids = ids_by_route(
        TINY_SHAPE
        if tiny
        else {"d_model": 256, "d_kv": 32, "d_ff": 512, "num_layers": 4, "num_heads": 8, "vocab_size": 1000}
    )
    model = new_model(shape_of("tiny" if tiny else "base"), patches=(7, 12)).to(
        DEVICE, torch.bfloat16 if ON_GPU else torch.float32
    )
    rows = [decoding_speed(model, num_rows, bandwidth, tiny) for num_rows in ((4,) if tiny else (64, 256, 512))]
    checks = {
        f"{route} writes the CPU's ids": written == ids["cpu"] for route, written in ids.items() if route != "cpu"
    }
    variety = [len(set(written)) / len(written) for written in ids["cpu"]]
    checks["the texts are not one token repeated"] = float(np.mean(variety)) > 0.2
    return {
        "num_texts": len(variety),
        "different_tokens_share": float(np.mean(variety)),
        "speed": rows,
        "checks": checks,
    }


def ids_by_route(shape: dict[str, Any]) -> dict[str, list[list[int]]]:
    import mmcot.decoding.generation as generation
    from mmcot.models import cuda_graphs

    model = new_model({**shape, "tie_word_embeddings": False}, patches=(7, 12))
    # With T5's initial weights every text is one token repeated. The output layer then prefers a token other than
    # the last one, and the cross-attention weighs more, so that texts vary and depend on the source.
    with torch.no_grad():
        model.lm_head.weight.copy_(model.shared.weight.roll(7, dims=0) * model.config.d_model**-0.5)
        for block in model.decoder.block:
            block.layer[1].EncDecAttention.o.weight.mul_(3.0)
    sources, features, limits = random_sources(model.config, 48)

    def write() -> list[list[int]]:
        return generation.generate_ids(
            model, sources, features, feature_shape=(7, 12), max_new_tokens=limits, num_rows=16, eos_token_ids=(1,)
        )

    routes = {"cpu": write()}
    static = cuda_graphs.StaticDecoder
    cuda_graphs.StaticDecoder = static if ON_GPU else (lambda decoder: decoder)
    model.to(DEVICE)
    routes["captured" if ON_GPU else "again"] = write()
    if ON_GPU:
        cuda_graphs.StaticDecoder = lambda decoder: decoder
        routes["plain CUDA"] = write()
    cuda_graphs.StaticDecoder = static
    return routes


def random_sources(
    config: MultimodalT5Config, count: int, *, longest: int = 96, new_tokens: int = 64
) -> tuple[list[list[int]], list[np.ndarray], list[int]]:
    random = np.random.default_rng(0)
    lengths, limits = (
        random.integers(longest // 3, longest + 1, count),
        random.integers(new_tokens // 4, new_tokens + 1, count),
    )
    sources = [random.integers(2, config.vocab_size, length).tolist() for length in lengths]
    features = [
        random.standard_normal((config.vision_num_patches, config.vision_dim)).astype(np.float16) for _ in sources
    ]
    return sources, features, limits.tolist()


def decoding_speed(model: T5ForMultimodalGeneration, num_rows: int, bandwidth: float, tiny: bool) -> dict[str, Any]:
    """Tokens a second of a task four times as large as its rows, lengths given, compared with the floor.

    The floor is the rate at which each step only reads the decoder's weights once and each row's own and cross keys
    and values at their mean length.
    """
    from mmcot.decoding.engine import open_engine
    from mmcot.decoding.generation import generate_ids

    config = model.config
    sources, features, limits = random_sources(config, num_rows * (2 if tiny else 4))
    longest = max(map(len, sources))
    engine = open_engine(model, num_rows=num_rows, max_source_tokens=longest, max_new_tokens=max(limits))

    def write() -> list[list[int]]:
        return generate_ids(
            model,
            sources,
            features,
            feature_shape=(7, 12),
            max_new_tokens=limits,
            num_rows=num_rows,
            eos_token_ids=(),
            engine=engine,
        )

    taken = seconds_of(write, 1 if tiny else 3)
    width = torch.finfo(model.dtype).bits // 8
    cross = {
        id(p)
        for block in model.decoder.block
        for p in (block.layer[1].EncDecAttention.k.weight, block.layer[1].EncDecAttention.v.weight)
    }
    weights = (
        sum(p.numel() for p in model.decoder.block.parameters() if id(p) not in cross) + model.lm_head.weight.numel()
    )
    columns = float(np.mean([np.mean(limits) / 2, np.mean([len(source) for source in sources])]) * 2)
    cache = num_rows * columns * config.num_decoder_layers * 2 * config.num_heads * config.d_kv
    floor = num_rows / ((weights + cache) * width / bandwidth)
    return {
        "rows": num_rows,
        "texts": len(sources),
        "tokens_per_s": sum(limits) / taken,
        "floor_tokens_per_s": floor,
        "share_of_floor": sum(limits) / taken / floor,
    }


PARTS: dict[str, Callable[[bool], dict[str, Any]]] = {
    "ceilings": ceilings,
    "golden": golden,
    "attention": attention,
    "training": training,
    "decoding": decoding,
}

if __name__ == "__main__":
    sys.exit(main())
