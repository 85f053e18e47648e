"""Attention of rows that read different numbers of columns with one query each, a few rows at a time.

Rows of one call are padded to the widest, and on a CPU the time of an attention over few queries is that of reading
keys and values. So neighbouring rows are attended together at the width of the widest of them alone, by two products
of matrices, for which keys are best stored transposed (``transformers``' own attention would copy such keys). The
function is given to transformers by its interface for attention (``AttentionInterface``), under ``NAME``.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import AttentionInterface, PreTrainedModel

NAME = "rows_in_groups"
ROWS_PER_GROUP = 8

Group = tuple[slice, int]  # some rows and the columns that they read


def groups_of(widths: Sequence[int]) -> list[Group]:
    """Groups of neighbouring rows that read so many columns each."""
    size = ROWS_PER_GROUP
    return [(slice(i, i + size), max(widths[i : i + size])) for i in range(0, len(widths), size)]


def attending_in_groups(model: PreTrainedModel) -> bool:
    """Let the model's attention take the argument ``row_groups``, which ``groups_of`` makes; returns whether it does.

    Args:
        model: a copy made by ``packed``. On other devices than CPUs, and where a model's attention cannot be chosen, it
            stays as it is.
    """
    shared = model.config
    takes_more = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(model.forward).parameters.values())
    is_chosen = shared._attn_implementation == "sdpa" and model._supports_attention_backend
    if model.device.type != "cpu" or not takes_more or not is_chosen:
        return False
    AttentionInterface.register(NAME, attend_in_groups)
    own = copy.deepcopy(shared)
    own._attn_implementation = NAME
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            cast(Any, module).config = own
    return True


def attend_in_groups(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    *,
    row_groups: Sequence[Group] | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it, softmax(query key^T · scaling + mask) value; returns [B, 1, H, K].

    Args:
        query: [B, H, 1, K].
        key: [B, G, T, K] of G heads, a divisor of H.
        value: as ``key``.
        attention_mask: additive, [B, 1, 1, T].
        row_groups: None, where a model does not pass it on: all rows at the width of the widest.
        scaling: K^-0.5 by default.
    """
    num_rows, num_heads, _, width = query.shape
    query_BGQK = query.reshape(num_rows, key.shape[1], -1, width) * (width**-0.5 if scaling is None else scaling)

    def attend(rows: slice, width: int) -> torch.Tensor:
        scores = query_BGQK[rows] @ key[rows, :, :width].transpose(-1, -2) + attention_mask[rows, ..., :width]
        weights = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
        return weights.to(value.dtype) @ value[rows, :, :width]

    attended_BGQK = torch.cat([attend(rows, width) for rows, width in row_groups or [(slice(None), key.shape[2])]])
    return attended_BGQK.reshape(num_rows, 1, num_heads, -1), None
