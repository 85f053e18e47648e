"""Objectives: the loss of a block as named sums, each with the unit over whose global number it is a mean.

    OBJECTIVES["text"](model, inputs, labels)     # {"text": (sum of the cross-entropies, "tokens")}

Each micro-batch contributes a sum; the caller divides by the number of its unit in the blocks of all ranks
(``count_units``). So the loss depends on neither world size nor accumulation. The loss is the sum of an objective's
parts.

Differs from the reference: padding has no loss, and every target token has the same weight
in every batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812 (the usual name)
from torch.utils.checkpoint import checkpoint

from mmcot.errors import InputError
from mmcot.texts.encoding import IGNORED_LABEL

UNITS = ("tokens", "questions", "pairs", "pair_tokens")
MIN_TEXT_TOKENS = 2  # a word and the end token: an empty text is the end token alone
LOGITS_AT_ONCE = 2**26  # of a long block: 268 MB in float32
LossParts = dict[str, tuple[torch.Tensor, str]]  # by name: a sum, and one of UNITS
Objective = Callable[[Any, dict[str, torch.Tensor], torch.Tensor], LossParts]


def token_loss_sum(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of the cross-entropies of all target tokens that are not ignored.

    Args:
        logits: [B, T, vocabulary], any float type; computed in float32.
        labels: int64 [B, T], -100 where there is no target.

    Returns:
        float32 scalar; 0 with a gradient of 0 where all labels are ignored.
    """
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum")


def is_long(num_labels: int, vocab_size: int) -> bool:
    """Whether the logits of this many labels are better never in memory together."""
    return num_labels * vocab_size > 2 * LOGITS_AT_ONCE


def chunked_loss_sum(
    states: torch.Tensor, labels: torch.Tensor, head: Callable[[Any], Any], vocab_size: int
) -> torch.Tensor:
    """``token_loss_sum`` of ``head(states)``, a chunk of tokens at a time; the backward pass computes logits again.

    Args:
        states: [B, T, D].
        labels: int64 [B, T], -100 where there is no target.
        head: from states [n, D] to logits [n, vocabulary].
    """

    def loss_of(chunk: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return token_loss_sum(head(chunk)[None], targets[None])

    num_tokens = max(1, LOGITS_AT_ONCE // vocab_size)
    chunks = zip(states.flatten(0, 1).split(num_tokens), labels.flatten().split(num_tokens), strict=True)
    losses = [checkpoint(loss_of, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    return torch.stack(losses).sum()


def text_objective(model: Any, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> LossParts:
    """The cross-entropy of the target tokens, by a mean over tokens."""
    return {"text": (model(**inputs, use_cache=False, summed_labels=labels).loss, "tokens")}


def matching_objective(model: Any, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> LossParts:
    """BLIP-2's three losses of pictures and texts, of a ``T5ForImageTextMatching``; the labels are the texts."""
    sums = model(vision_features=inputs["vision_features"], vision_mask=inputs.get("vision_mask"), paired_labels=labels)
    units = {"contrastive": "pairs", "matching": "pairs", "generation": "pair_tokens"}
    return {name: (sums[name], unit) for name, unit in units.items()}


# By name. An objective takes the model (or its engine), a block's tensors without labels, and the labels.
OBJECTIVES: dict[str, Objective] = {"text": text_objective, "matching": matching_objective}


def objective_named(name: str) -> Objective:
    """Return an objective by its name.

    Raises:
        ValueError: there is none; the message names those that exist.
    """
    if name not in OBJECTIVES:
        raise InputError(f"objective {name!r} is unknown; expected one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]


def count_target_tokens(labels: torch.Tensor) -> int:
    """The number of labels that are not ignored."""
    return int((labels != IGNORED_LABEL).sum())


def rows_with_text(labels: torch.Tensor) -> torch.Tensor:
    """Which rows [B] of labels [B, T] have a text and not its end alone, bool."""
    return (labels != IGNORED_LABEL).sum(dim=1) >= MIN_TEXT_TOKENS


def count_units(tensors: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """The number of each of ``UNITS`` in a block that is no dummy; a pair is a row with a picture and a text.

    Args:
        tensors: of the block, on the host; see ``mmcot.texts.encoding.collate``.
    """
    labels, is_pair = tensors["labels"], rows_with_text(tensors["labels"])
    if "vision_mask" in tensors:
        is_pair = is_pair & tensors["vision_mask"].any(dim=1)
    return {
        "tokens": float(count_target_tokens(labels)),
        "questions": float(len(labels)),
        "pairs": float(is_pair.sum()),
        "pair_tokens": float(count_target_tokens(labels[is_pair])),
    }
