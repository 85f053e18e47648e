"""The batches in which sources are encoded: the longest sources first, so that a batch has similar lengths.

    for batch in batch_sources(sources, features, feature_shape=(100, 256), pad_token_id=0, dtype=torch.float32):
        states = read(**batch.inputs)     # of the sources batch.indices

Batches depend on the sources, the dtype and the device's kind alone. They may be made ahead, in another thread.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import cast

import numpy as np
import torch

from mmcot.models.contract import GenerativeModel
from mmcot.texts.encoding import stack_features

SOURCES_PER_BATCH = {"cpu": 16, "cuda": 128}
# On a GPU a batch has no more tokens, padding included, and half of them in float32: T5 of the base size in bf16 needs
# some 2 GB for it, of which 0.4 GB are the position bias of 64 sources of 512 tokens.
TOKENS_PER_BATCH = 32_768


@dataclasses.dataclass(frozen=True, slots=True)
class SourceBatch:
    """Sources that are encoded together: their indices, and the encoder's inputs on the host."""

    indices: tuple[int, ...]
    inputs: dict[str, torch.Tensor]


def batch_sources(
    sources: Sequence[Sequence[int]],
    features: Sequence[np.ndarray | None],
    *,
    feature_shape: tuple[int, int],
    pad_token_id: int,
    dtype: torch.dtype,
    for_gpu: bool = False,
) -> Iterator[SourceBatch]:
    """Yield all sources in batches.

    Args:
        features: an array [p, V] for each source, or all None.
        feature_shape: [P, V] with p <= P.
        dtype: of the features; the model's.
        for_gpu: larger batches, in page-locked memory.
    """
    for indices in _split(list(map(len, sources)), dtype, for_gpu):
        inputs = collate_sources(
            [sources[index] for index in indices],
            [features[index] for index in indices],
            feature_shape=feature_shape,
            pad_token_id=pad_token_id,
            dtype=dtype,
        )
        yield SourceBatch(
            indices, {name: tensor.pin_memory() if for_gpu else tensor for name, tensor in inputs.items()}
        )


def batches_for(
    model: GenerativeModel,
    sources: Sequence[Sequence[int]],
    features: Sequence[np.ndarray | None],
    *,
    feature_shape: tuple[int, int],
) -> Iterator[SourceBatch]:
    """``batch_sources`` as a model reads them."""
    return batch_sources(
        sources,
        features,
        feature_shape=feature_shape,
        pad_token_id=model.config.pad_token_id or 0,  # any will do where none is named: it is masked
        dtype=model.dtype,
        for_gpu=model.device.type == "cuda",
    )


def collate_sources(
    sources: Sequence[Sequence[int]],
    features: Sequence[np.ndarray | None],
    *,
    feature_shape: tuple[int, int],
    pad_token_id: int,
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """The encoder's inputs for some sources: ids and mask int64 [B, S], features [B, P, V] and their mask."""
    lengths = torch.tensor([len(source) for source in sources])
    mask_BS = torch.arange(int(lengths.max())) < lengths[:, None]
    ids_BS = torch.full(mask_BS.shape, pad_token_id)
    ids_BS[mask_BS] = torch.tensor(list(chain.from_iterable(sources)), dtype=torch.long)
    inputs = {"input_ids": ids_BS, "attention_mask": mask_BS.long()}
    if features[0] is not None:
        inputs |= stack_features(cast("Sequence[np.ndarray]", features), feature_shape)
        inputs["vision_features"] = inputs["vision_features"].to(dtype)
    return inputs


def _split(lengths: Sequence[int], dtype: torch.dtype, for_gpu: bool) -> Iterator[tuple[int, ...]]:
    """The indices of each batch, by falling length."""
    by_length = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    most, start = SOURCES_PER_BATCH["cuda" if for_gpu else "cpu"], 0
    num_tokens = TOKENS_PER_BATCH * torch.bfloat16.itemsize // dtype.itemsize
    while start < len(by_length):
        longest = lengths[by_length[start]]
        number = min(most, max(1, num_tokens // longest)) if for_gpu else most
        yield tuple(by_length[start : start + number])
        start += number
