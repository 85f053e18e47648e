"""Retrieval: how often a picture's most similar text, among all different texts of a split, is its own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from launcher.runs.hang_guard import HangGuard
from launcher.training.collectives import gather_rows, host_sum
from launcher.training.loader import StageStream
from mmcot.models.loss import rows_with_text
from mmcot.models.matching_losses import similarities

PICTURES_AT_ONCE = 64


def measure_retrieval(
    engine: Any, stream: StageStream, num_steps: int, *, rank: int, world_size: int, hang_guard: HangGuard
) -> dict[str, float]:
    """Rank the different texts of a split for each of its pictures; every rank calls it, and all get the result.

    Pictures stay on their rank, texts are gathered. Rows without a picture or a text are left out.

    Returns:
        ``retrieval_at_1``, the share of pictures whose most similar text equals their own, and ``retrieval_texts``,
        the number of different texts.
    """
    engine.eval()
    embedded = list(_embedded(engine, stream, num_steps, rank=rank, world_size=world_size, hang_guard=hang_guard))
    pictures_NKE, texts_NE, keys_N = (torch.cat(parts) for parts in zip(*embedded, strict=True))
    keys_U, texts_UE = _different(*(gather_rows(rows) for rows in _different(keys_N, texts_NE)))
    num_right = 0
    for pictures_BKE, keys_B in zip(pictures_NKE.split(PICTURES_AT_ONCE), keys_N.split(PICTURES_AT_ONCE), strict=True):
        hang_guard.progress()
        if len(keys_B):
            found_B = similarities(pictures_BKE, texts_UE).argmax(dim=1).cpu()
            num_right += int((keys_U[found_B] == keys_B).sum())
    right, total = host_sum([float(num_right), float(len(keys_N))])
    return {"retrieval_at_1": right / max(1.0, total), "retrieval_texts": float(len(keys_U))}


def _embedded(
    engine: Any, stream: StageStream, num_steps: int, *, rank: int, world_size: int, hang_guard: HangGuard
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Of each block: pictures [n, K, E], texts [n, E] and, in main memory, the texts' keys int64 [n]."""
    for step in stream.steps(rank=rank, world_size=world_size, steps=range(num_steps)):
        hang_guard.progress()
        for _, block in step.blocks:
            labels, mask = block.labels, block.tensors["vision_mask"]
            inputs = {name: block.tensors[name].to(engine.device) for name in ("vision_features", "vision_mask")}
            with torch.no_grad():  # of a dummy block too: under ZeRO-3 all ranks call alike
                found = engine(**inputs, paired_labels=labels.to(engine.device), only_embeds=True)
            is_pair = rows_with_text(labels) & mask.any(dim=1)
            keys = torch.tensor([_key(row) for row in labels], dtype=torch.int64)
            pictures_BKE, texts_BE = (vectors[is_pair.to(engine.device)] for vectors in found)
            yield pictures_BKE, texts_BE, keys[is_pair]


def _key(labels: torch.Tensor) -> int:
    """A number for a text, by its tokens alone."""
    ids = labels[labels >= 0].numpy().tobytes()
    return int.from_bytes(hashlib.blake2b(ids, digest_size=8).digest(), "big", signed=True)


def _different(keys_N: torch.Tensor, texts_NE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and texts with each key once, in the order of keys."""
    _, first = np.unique(keys_N.numpy(), return_index=True)
    rows = torch.from_numpy(first)
    return keys_N[rows], texts_NE[rows.to(texts_NE.device)]
