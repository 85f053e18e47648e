"""A copy of an encoder that shares its weights and computes with packed ones on a CPU.

    encoder = packed_encoder(model.encoder)     # once
    encoder(input_ids=..., attention_mask=...)  # for every batch, without gradients

oneDNN multiplies by a packed weight faster than by a plain one. The packed weights take as much memory again.
The copy keeps the class and the parameters' names of the original, which is left as it is.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

from mmcot.models.step_decoder import pack_linear

Encoder = TypeVar("Encoder", bound=nn.Module)


@torch.inference_mode()
def packed_encoder(encoder: Encoder) -> Encoder:
    """Return the encoder with all its linear layers packed; on a GPU, the encoder itself."""
    if next(encoder.parameters()).device.type != "cpu":
        return encoder
    shared = {id(tensor): tensor for tensor in (*encoder.parameters(), *encoder.buffers())}
    packed = copy.deepcopy(encoder, shared)
    for module in packed.modules():
        if isinstance(module, nn.Linear):
            object.__setattr__(module, "forward", pack_linear(module.weight, module.bias))
    return packed
