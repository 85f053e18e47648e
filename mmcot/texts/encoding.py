"""From texts and features to tensors.

A tokenizer is any transformers fast tokenizer with a padding and an end token. The one that
``tokenizer.py`` trains needs no download and opens with ``AutoTokenizer.from_pretrained``.

Shape suffixes: B batch, S source positions, T target positions, P patches, V feature width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from mmcot.texts.prompts import PICTURE_MARK
from mmcot.texts.text_ids import encode_text

IGNORED_LABEL = -100  # padding of the target, which has no loss


@dataclasses.dataclass(frozen=True, slots=True)
class EncodedPair:
    """A source and a target as token ids, both ending in the end token.

    ``source_cut`` and ``target_cut`` count the tokens that the length limits removed.
    """

    source_ids: tuple[int, ...]
    target_ids: tuple[int, ...]
    source_cut: int
    target_cut: int


@dataclasses.dataclass(frozen=True, slots=True)
class PictureTokens:
    """How pictures stand in a source: each is ``per_picture`` times ``token_id``, in place of which the model reads it.

    Of a sample with more than ``max_pictures`` the first ones are read.
    """

    per_picture: int
    token_id: int
    max_pictures: int


def encode_pair(
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    target: str,
    *,
    max_source_tokens: int,
    max_target_tokens: int,
    pictures: PictureTokens | None = None,
) -> EncodedPair:
    """Tokenize a pair and truncate each side to its limit (the end token included).

    Args:
        pictures: tokens of the pictures that ``PICTURE_MARK`` stands for in the source; None: it has no marks.
    """
    ids = encode_text(tokenizer, source) if pictures is None else encode_marked(tokenizer, source, pictures)
    source_ids, source_cut = _limit(ids, max_source_tokens)
    target_ids, target_cut = _limit(encode_text(tokenizer, target), max_target_tokens)
    return EncodedPair(source_ids, target_ids, source_cut, target_cut)


def encode_marked(tokenizer: PreTrainedTokenizerBase, source: str, pictures: PictureTokens) -> list[int]:
    """Return the ids of a source in which ``PICTURE_MARK`` stands for pictures."""
    ids: list[int] = []
    for number, text in enumerate(source.split(PICTURE_MARK)):
        if 0 < number <= pictures.max_pictures:
            ids += [pictures.token_id] * pictures.per_picture
        if text := text.strip():
            ids += encode_text(tokenizer, text)[:-1]
    return [*ids, encode_text(tokenizer, "")[-1]]


def collate(
    pairs: Sequence[EncodedPair],
    features: Sequence[np.ndarray | None],
    *,
    feature_shape: tuple[int, int],
    pad_token_id: int,
    decoder_start_token_id: int | None = None,
    is_dummy: bool = False,
    length_multiple: int = 1,
) -> dict[str, torch.Tensor]:
    """Pad a block to its own longest row and stack it.

    Args:
        pairs: B encoded pairs.
        features: B arrays [p, V] with p <= P, or all None for text alone.
        feature_shape: [P, V]; missing patches are zeros.
        decoder_start_token_id: of a model with a decoder; the block then has ``decoder_input_ids``, the labels
            shifted by one behind this token, so that logits are aligned with labels.
        is_dummy: all labels are ignored, so that the block has no gradient.
        length_multiple: S and T are rounded up to multiples of it; a GPU's attention is fast and small at multiples
            of 8.

    Returns:
        input_ids int64 [B, S], attention_mask int64 [B, S], labels int64 [B, T] padded
        with -100, decoder_input_ids int64 [B, T] padded with the padding token, and with
        features vision_features float32 [B, P, V] and vision_mask
        bool [B, P].
    """
    batch = {
        "input_ids": _stack([pair.source_ids for pair in pairs], pad_token_id, length_multiple),
        "labels": _stack([pair.target_ids for pair in pairs], IGNORED_LABEL, length_multiple),
    }
    lengths = torch.tensor([len(pair.source_ids) for pair in pairs])
    batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()
    if is_dummy:
        batch["labels"].fill_(IGNORED_LABEL)
    if decoder_start_token_id is not None:
        shifted = batch["labels"].roll(1, dims=1)
        shifted[:, 0] = decoder_start_token_id
        batch["decoder_input_ids"] = shifted.masked_fill(shifted == IGNORED_LABEL, pad_token_id)
    if features and features[0] is not None:
        batch |= stack_features(cast("Sequence[np.ndarray]", features), feature_shape)  # all or none are None
    return batch


def stack_features(features: Sequence[np.ndarray], feature_shape: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Stack arrays [p, V] into vision_features float32 [B, P, V], zeros where vision_mask [B, P] is False."""
    stacked = np.zeros((len(features), *feature_shape), dtype=np.float32)
    for row, array in zip(stacked, features, strict=True):
        row[: len(array)] = array
    num_patches = torch.tensor([len(array) for array in features])
    return {
        "vision_features": torch.from_numpy(stacked),
        "vision_mask": torch.arange(feature_shape[0]) < num_patches[:, None],
    }


def _limit(ids: list[int], limit: int) -> tuple[tuple[int, ...], int]:
    cut = max(0, len(ids) - limit)
    return ((*ids[: limit - 1], ids[-1]) if cut else tuple(ids)), cut


def _stack(rows: Sequence[Sequence[int]], filler: int, multiple: int) -> torch.Tensor:
    longest = max(len(row) for row in rows)
    stacked = np.full((len(rows), -(-longest // multiple) * multiple), filler, dtype=np.int64)
    for line, row in zip(stacked, rows, strict=True):
        line[: len(row)] = row
    return torch.from_numpy(stacked)
