"""What a bridge from picture to text must offer, and how a new one starts.

A new bridge is a class, and an entry of ``BRIDGES``: a user's in a module of their own (docs/extending.md), one of ours
in ``mmcot/models/fusion.py``:

    class MeanPatch(Bridge):
        def __init__(self, *, d_model, vision_dim, gate_start=0.0):
            super().__init__()
            self.project = nn.Linear(vision_dim, d_model)

        def forward(self, text_BSD, text_mask_BS, vision_BPV, vision_mask_BP=None):
            return text_BSD + self.project(vision_BPV.mean(1, keepdim=True)), text_mask_BS

        def forward_flops(self, source_lengths, num_patches):
            return 2 * self.project.in_features * self.project.out_features

Shape suffixes: B batch, S text positions, P patches, D model width, V feature width, N states.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from transformers import initialization as init

Lengths = Any  # a float or an array of them: arithmetic alone is used
Length = TypeVar("Length", int, np.ndarray)


@dataclasses.dataclass(frozen=True)
class AttentionMaps:
    """Attention, output and gate of a bridge on a batch.

    ``attention_BSP`` float [B, S, P] sums to 1 over the patches, or is 0 where all are masked; its rows are the
    source's tokens, or with ``of_media`` the media tokens.
    ``fused_BSD`` [B, S, D] are the states that it leads to, where they were computed; ``gate_BS`` float [B, S] in 0..1,
    the gate's mean over the width, None without a gate.
    """

    attention_BSP: torch.Tensor  # noqa: N815 (a shape suffix)
    fused_BSD: torch.Tensor | None = None  # noqa: N815 (a shape suffix)
    gate_BS: torch.Tensor | None = None  # noqa: N815 (a shape suffix)
    of_media: bool = False


class Bridge(nn.Module):
    """A bridge; constructed with the keywords ``d_model``, ``vision_dim`` and ``gate_start``.

    Linear layers start normal by fan-in with zero biases, layer norms with ones and zeros; every other module by its
    ``reset_parameters()``, which a bridge with parameters of its own must define too. The bridge is named
    ``encoder.bridge`` in a model's weights.
    """

    parts_in_encoder = False  # True: the parts are named in the encoder itself, as published weights have them
    in_embeddings = False  # True: pictures take the place of embeddings (``place`` of mmcot/models/media.py)
    in_layers = False  # True: the decoder's own layers read the states that are added (mmcot/models/gated_t5.py)

    def forward(
        self,
        text_BSD: torch.Tensor,
        text_mask_BS: torch.Tensor,
        vision_BPV: torch.Tensor,
        vision_mask_BP: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the states that the decoder reads.

        Args:
            text_BSD: [B, S, D], the encoder's states.
            text_mask_BS: [B, S], 0 at padding.
            vision_BPV: [B, P, V]; P is 1 where a pooled vector stands for all patches.
            vision_mask_BP: bool [B, P], False at absent patches; None where all are seen.

        Returns:
            states [B, N, D] and their mask [B, N], of the text mask's type, 0 at states that are not to be read.
        """
        raise NotImplementedError(f"{type(self).__name__} has no forward; see {__name__}")

    def num_states(self, num_tokens: Length, num_patches: int) -> Length:
        """N for S; a bridge that adds positions must say how many."""
        return num_tokens

    def forward_flops(self, source_lengths: Lengths, num_patches: int) -> Lengths:
        """Operations of the matrix products of a forward pass, for each question; a multiply-add counts as two.

        Args:
            source_lengths: tokens of the questions, an array of floats.
            num_patches: P.

        Returns:
            an array of the same shape, or a number where it is the same for all.
        """
        raise NotImplementedError(f"{type(self).__name__} must count its operations: define forward_flops")

    def attention_maps(
        self,
        text_BSD: torch.Tensor,
        text_mask_BS: torch.Tensor,
        vision_BPV: torch.Tensor,
        vision_mask_BP: torch.Tensor | None = None,
    ) -> AttentionMaps | None:
        """Attention of the text to the patches, for the arguments of ``forward``; None: this bridge has none."""
        return None

    def observe(self, inputs: Mapping[str, torch.Tensor] | None) -> None:
        """Measure for ``watch`` in the forward passes of this batch (the model's inputs), or in none."""

    def watch(self) -> dict[str, float]:
        """What was measured since the last call, by the name of a metric."""
        return {}


def init_bridge_part(module: nn.Module, factor: float) -> None:
    """Initialise one module of a bridge, without its children.

    Shapes of weights are not read: with partitioned parameters (ZeRO-3) they have none.
    """
    if isinstance(module, nn.Linear):
        init.normal_(module.weight, mean=0.0, std=factor * module.in_features**-0.5)
        if module.bias is not None:
            init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        if module.weight is not None:
            init.ones_(module.weight)
        if module.bias is not None:
            init.zeros_(module.bias)
    elif callable(reset := getattr(module, "reset_parameters", None)):
        reset()
    elif next(module.parameters(recurse=False), None) is not None:
        raise TypeError(f"{type(module).__name__} has parameters of its own and no reset_parameters(); define it")
