"""The loss: a mean over the target tokens of the *global* batch.

Each micro-batch contributes a sum; the caller divides by the number of target tokens of all
ranks. So the loss depends on neither world size nor accumulation.

Differs from the reference: padding has no loss, and every target token has the same weight
in every batch.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F  # noqa: N812 (the usual name)

from mmcot.texts.encoding import IGNORED_LABEL


def token_loss_sum(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of the cross-entropies of all target tokens that are not ignored.

    Args:
        logits: [B, T, vocabulary], any float type; computed in float32.
        labels: int64 [B, T], -100 where there is no target.

    Returns:
        float32 scalar; 0 with a gradient of 0 where all labels are ignored.
    """
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum")


def count_target_tokens(labels: torch.Tensor) -> int:
    """The number of labels that are not ignored."""
    return int((labels != IGNORED_LABEL).sum())
