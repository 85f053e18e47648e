"""Objectives: the loss of a block as named sums, each with the unit over whose global number it is a mean.

    OBJECTIVES["text"](model, inputs, labels)     # {"text": (sum of the cross-entropies, "tokens")}

Each micro-batch contributes a sum; the caller divides by the number of target tokens, or of questions, of all
ranks. So the loss depends on neither world size nor accumulation. The loss is the sum of an objective's parts.

Differs from the reference: padding has no loss, and every target token has the same weight
in every batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812 (the usual name)
from torch.utils.checkpoint import checkpoint

from mmcot.errors import InputError
from mmcot.texts.encoding import IGNORED_LABEL

UNITS = ("tokens", "questions")
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


# By name. An objective takes the model (or its engine), a block's tensors without labels, and the labels.
OBJECTIVES: dict[str, Objective] = {"text": text_objective}


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
