"""Equal ids on every route, waits of the host, and tokens a second compared with the memory bandwidth."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from benchmarks.gpu_parts.machine import (
    DEVICE,
    ON_GPU,
    Proof,
    copy_bytes_per_s,
    profile_of,
    seconds_of,
    unexpected,
    waits_of,
)
from benchmarks.gpu_parts.models import SMALL_SHAPE, TINY_PATCHES, TINY_SHAPE, new_model, random_sources, shape_of
from mmcot.decoding.generation import generate_ids
from mmcot.decoding.rows import open_rows
from mmcot.models import cuda_graphs
from mmcot.models.device import open_device
from mmcot.models.step_decoder import StepDecoder

ROWS = (64, 256, 512)
# Where decoding may wait for the device: the chosen tokens of several steps are read. All other waits are mistakes.
INTENDED_WAITS = ("mmcot/models/cuda_graphs.py: return lambda: self._chosen_NB[",)


def decoding(proof: Proof) -> dict[str, Any]:
    """Routes in fp32, waits and speed in bf16."""
    open_device(use_gpu=ON_GPU)
    result: dict[str, Any] = {"checks": {}}
    ids = ids_by_route(TINY_SHAPE if proof.tiny else SMALL_SHAPE)
    variety = [len(set(written)) / len(written) for written in ids["cpu"]]
    result |= {"num_texts": len(variety), "different_tokens_share": float(np.mean(variety))}
    result["checks"] |= {
        f"{route} writes the CPU's ids": written == ids["cpu"] for route, written in ids.items() if route != "cpu"
    } | {"the texts are not one token repeated": float(np.mean(variety)) > 0.2}
    proof.keep(result)
    if ON_GPU:
        waits, num_steps = waits_of_decoding(proof.tiny)
        result |= {"waits": waits, "waits_of_steps": num_steps}
        result["checks"] |= {
            "the host waits nowhere but where it must": not unexpected(waits, INTENDED_WAITS),
            "the host waits at most once in eight tokens": sum(waits.values()) <= num_steps,
        }
        proof.keep(result)
    bandwidth = copy_bytes_per_s(proof.tiny)
    model = new_model(shape_of("tiny" if proof.tiny else "base"), patches=TINY_PATCHES, device=DEVICE.type).to(
        torch.bfloat16 if ON_GPU else torch.float32
    )
    result["speed"] = []
    for num_rows in (4,) if proof.tiny else ROWS:
        result["speed"].append(decoding_speed(model, num_rows, bandwidth, proof.tiny))
        proof.keep(result)
    best = max(result["speed"], key=lambda row: row["tokens_per_s"])
    result["headline"] = (
        f"{best['tokens_per_s']:,.0f} tokens/s at {best['rows']} rows, {best['share_of_floor']:.1%} of the floor"
    )
    return result


def ids_by_route(shape: dict[str, Any]) -> dict[str, list[list[int]]]:
    """The ids of 48 texts on the CPU, with captured graphs, and on the device without graphs."""
    model = writing_model(shape)
    sources, features, limits = random_sources(model.config, 48)

    def write() -> list[list[int]]:
        return generate_ids(
            model, sources, features, feature_shape=TINY_PATCHES, max_new_tokens=limits, num_rows=16, eos_token_ids=(1,)
        )

    routes = {"cpu": write()}
    model.to(DEVICE)
    routes["captured" if ON_GPU else "again"] = write()
    if ON_GPU:
        static = cuda_graphs.StaticDecoder
        cuda_graphs.StaticDecoder = open_plain  # pyright: ignore[reportAttributeAccessIssue]
        try:
            routes["plain CUDA"] = write()
        finally:
            cuda_graphs.StaticDecoder = static
    return routes


def open_plain(model: Any, *, num_rows: int, max_source_tokens: int, max_new_tokens: int) -> StepDecoder:
    """The decoder of CPUs on the device; sources get memory as they come."""
    return StepDecoder(model, num_rows=num_rows, max_new_tokens=max_new_tokens)


def writing_model(shape: dict[str, Any]) -> Any:
    """A model whose texts vary and depend on the source.

    With T5's initial weights every text is one token repeated. Here the output layer prefers a token other than the
    last one, and the cross-attention weighs more.
    """
    model = new_model({**shape, "tie_word_embeddings": False}, patches=TINY_PATCHES)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.shared.weight.roll(7, dims=0) * model.config.d_model**-0.5)
        for block in model.decoder.block:
            block.layer[1].EncDecAttention.o.weight.mul_(3.0)
    return model


def waits_of_decoding(tiny: bool) -> tuple[dict[str, int], int]:
    """Where the host waits while texts are written, graphs captured before; and the number of steps and sources."""
    model = writing_model(TINY_SHAPE if tiny else SMALL_SHAPE).to(DEVICE)
    sources, features, _ = random_sources(model.config, 32)
    steps: list[None] = []

    def write() -> None:
        steps.clear()
        generate_ids(
            model,
            sources,
            features,
            feature_shape=TINY_PATCHES,
            max_new_tokens=32,
            num_rows=16,
            eos_token_ids=(),
            on_step=lambda: steps.append(None),
        )

    write()
    return waits_of(write), len(steps)


def decoding_speed(model: Any, num_rows: int, bandwidth: float, tiny: bool) -> dict[str, Any]:
    """Tokens a second of a task four times as large as its rows, lengths given, compared with the floor.

    The floor is the rate at which each step only reads the decoder's weights once and each row's own and cross keys
    and values at their mean length.
    """
    config = model.config
    sources, features, limits = random_sources(config, num_rows * (2 if tiny else 4))
    longest = max(map(len, sources))
    rows = open_rows(model, num_rows=num_rows, max_source_tokens=longest, max_new_tokens=max(limits))

    def write() -> list[list[int]]:
        return generate_ids(
            model,
            sources,
            features,
            feature_shape=TINY_PATCHES,
            max_new_tokens=limits,
            num_rows=num_rows,
            eos_token_ids=(),
            rows=rows,
        )

    taken = seconds_of(write, 1 if tiny else 2)
    profile = profile_of(write)
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
        **({"busy_share": profile["kernel_s"] / taken, "profile": profile} if profile else {}),
    }
