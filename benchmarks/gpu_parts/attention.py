"""The kernels of attention, the cost of new shapes, and whether gradients are finite."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import torch

from benchmarks.gpu_parts.machine import DEVICE, ON_GPU, Proof, synchronize
from benchmarks.gpu_parts.models import TINY_SHAPE, new_model, patches_of, random_batch, shape_of
from mmcot.models.device import open_device

SDP_OPS = "aten::_scaled_dot_product_"
# Lengths that are 64 more than a multiple of 128 have been reported (pytorch#196678); the others are for comparison.
MASKED_LENGTHS = (64, 96, 128, 192, 320, 448)
NEW_SHAPES = 20


def attention(proof: Proof) -> dict[str, Any]:
    """As the product runs, then with cuDNN's attention on and off."""
    size = "tiny" if proof.tiny else "base"
    shape = TINY_SHAPE if proof.tiny else {**shape_of("base"), "num_layers": 2}
    model = new_model(shape, patches=patches_of(size)).to(DEVICE)
    result: dict[str, Any] = {}
    ways = {"as the product runs": None, "cuDNN on": True, "cuDNN off": False}
    if not proof.judged:
        del ways["cuDNN on"]  # such a device need not have cuDNN
    for name, cudnn in ways.items():
        if cudnn is None:
            open_device(use_gpu=ON_GPU)
        else:
            torch.backends.cuda.enable_cudnn_sdp(cudnn)
        result[name] = {
            "kernels_fp32": attention_kernels(model.float()),
            "kernels_bf16": attention_kernels(model.bfloat16()),
            "new_shapes_s": seconds_of_new_shapes(model, 2 if proof.tiny else NEW_SHAPES),
            "lengths_with_nan": lengths_with_nan(MASKED_LENGTHS[:1] if proof.tiny else MASKED_LENGTHS),
        }
        proof.keep(result)
    open_device(use_gpu=ON_GPU)
    product = result["as the product runs"]
    kernels = [kernel for kind in ("kernels_fp32", "kernels_bf16") for kernel in product[kind]]
    seconds = {name: found["new_shapes_s"] for name, found in result.items()}
    return {
        **result,
        "headline": ", ".join(f"new shapes {name} {taken:.2f} s" for name, taken in seconds.items()),
        "checks": {
            "attention is one operator": bool(kernels),
            "the product never takes cuDNN's attention": not any("cudnn" in kernel for kernel in kernels),
            "the product's gradients of masked attention are finite": not product["lengths_with_nan"],
        },
    }


def attention_kernels(model: Any) -> dict[str, int]:
    """Attention operators of a training pass and of an encoder pass without gradients, with their calls."""
    batch = {
        name: tensor.to(DEVICE) for name, tensor in random_batch(model.config, rows=4, source=96, target=64).items()
    }
    batch["vision_features"] = batch["vision_features"].to(model.dtype)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(**batch, use_cache=False).loss.backward()
        with torch.inference_mode():
            model.encoder(**{name: tensor for name, tensor in batch.items() if name != "labels"})
    return dict(
        Counter(event.name.removeprefix(SDP_OPS) for event in profile.events() or () if event.name.startswith(SDP_OPS))
    )


def seconds_of_new_shapes(model: Any, count: int) -> float:
    """A forward and a backward pass over blocks of new lengths, after a warm-up block."""
    batches = [
        random_batch(model.config, rows=4, source=97 + 3 * number, target=33 + number, seed=number)
        for number in range(count + 1)
    ]
    started = 0.0
    for number, batch in enumerate(batches):
        moved = {name: tensor.to(DEVICE) for name, tensor in batch.items()}
        moved["vision_features"] = moved["vision_features"].to(model.dtype)
        model(**moved, use_cache=False).loss.backward()
        if number == 0:
            synchronize()
            started = time.perf_counter()
    synchronize()
    return time.perf_counter() - started


def lengths_with_nan(lengths: tuple[int, ...]) -> list[int]:
    """Lengths at which a masked attention in bf16 has gradients that are not finite."""
    found = []
    for length in lengths:
        torch.manual_seed(length)
        query, key, value = (
            torch.randn(4, 12, length, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
        )
        mask = torch.zeros(4, 1, length, length, device=DEVICE, dtype=torch.bfloat16)
        mask[1, ..., length // 2 :] = float("-inf")
        torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=1.0).sum().backward()
        gradients = [tensor.grad for tensor in (query, key, value)]
        if not all(gradient is not None and bool(torch.isfinite(gradient).all()) for gradient in gradients):
            found.append(length)
    return found
