"""Writing texts: greedy generation for a set of questions with one model.

The result of a question depends on the model and the set of questions passed with it,
never on who calls or when.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from mmcot.encoding import stack_features
from mmcot.model import T5ForMultimodalGeneration


@dataclasses.dataclass(frozen=True, slots=True)
class GeneratedText:
    """What the model wrote. ``finish`` is "eos", or "length" where the limit cut it off."""

    text: str
    num_tokens: int
    finish: str


@torch.inference_mode()
def generate_texts(
    model: T5ForMultimodalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[Sequence[int]],
    features: Sequence[np.ndarray | None],
    *,
    feature_shape: tuple[int, int],
    max_new_tokens: int,
    batch_size: int,
) -> list[GeneratedText]:
    """Write one text for each source, greedily, in batches sorted by source length.

    Args:
        sources: token ids of each source.
        features: an array [p, V] for each source, or all None.
        feature_shape: [P, V] with p <= P.

    Returns:
        texts in the order of ``sources``.
    """
    texts: list[GeneratedText | None] = [None] * len(sources)
    by_length = sorted(range(len(sources)), key=lambda index: (-len(sources[index]), index))
    for start in range(0, len(by_length), batch_size):
        chosen = by_length[start : start + batch_size]
        inputs = _collate_sources(model, tokenizer, [sources[i] for i in chosen], [features[i] for i in chosen], feature_shape)
        outputs = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, use_cache=True)
        for index, row in zip(chosen, outputs[:, 1:].tolist(), strict=True):
            texts[index] = _read_row(tokenizer, row)
    return texts


def _collate_sources(model, tokenizer, sources, features, feature_shape) -> dict[str, torch.Tensor]:
    width = max(len(source) for source in sources)
    ids = torch.full((len(sources), width), tokenizer.pad_token_id)
    for row, source in zip(ids, sources, strict=True):
        row[: len(source)] = torch.tensor(source)
    lengths = torch.tensor([len(source) for source in sources])
    inputs = {"input_ids": ids, "attention_mask": (torch.arange(width) < lengths[:, None]).long()}
    if features[0] is not None:
        inputs |= stack_features(features, feature_shape)
        inputs["vision_features"] = inputs["vision_features"].to(model.dtype)
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}


def _read_row(tokenizer: PreTrainedTokenizerBase, row: list[int]) -> GeneratedText:
    ended = tokenizer.eos_token_id in row
    ids = row[: row.index(tokenizer.eos_token_id)] if ended else row
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return GeneratedText(text=text, num_tokens=len(ids) + ended, finish="eos" if ended else "length")
