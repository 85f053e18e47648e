"""A module tree whose linear layers apply packed weights, for inference on CPUs.

    encoder = packed(model.encoder)
    with torch.inference_mode():
        states = encoder(input_ids=ids_BS).last_hidden_state

The weights are packed once, in ``packed``: a change of the module's weights afterwards does not reach the copy's
linear layers. The packed weights take as much memory as the linear layers themselves.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from mmcot.models.packed_linear import pack_linear


def packed(module: nn.Module) -> Any:
    """A copy of the tree of ``module`` whose ``nn.Linear`` and ``Conv1D`` layers apply packed weights.

    The copy shares all parameters and buffers with ``module``, which is not changed. A row of a packed layer's result
    is the same, bit for bit, whatever other rows stand in the call. Where gradients are enabled, the copy's layers
    compute as those of ``module`` do. Subclasses of the two layers stay as they are: some read their own weights.

    Returns:
        the copy, of the class of ``module``; ``module`` itself on other devices than CPUs.
    """
    device = next((parameter.device.type for parameter in module.parameters()), "cpu")
    return _copy(module, {}) if device == "cpu" else module


def _copy(module: nn.Module, copies: dict[int, nn.Module]) -> nn.Module:
    """Copy a tree; a module that stands at several places is copied once."""
    if id(module) not in copies:
        copies[id(module)] = copied = copy.copy(module)
        copied._parameters, copied._buffers = module._parameters.copy(), module._buffers.copy()
        copied._modules = {
            name: None if child is None else _copy(child, copies) for name, child in module._modules.items()
        }
        if type(module) in PACKED:
            copied.__class__ = PACKED[type(module)]
            cast(Any, copied).pack()
    return copies[id(module)]


class PackedLinear(nn.Linear):
    """An ``nn.Linear`` with a packed copy of its weight beside it."""

    def pack(self) -> None:
        """Pack the weight as it is now."""
        self.apply_packed = pack_linear(self.weight, self.bias)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Apply the layer to [..., in]; returns [..., out]."""
        return super().forward(input) if torch.is_grad_enabled() else self.apply_packed(input)


class PackedConv1D(Conv1D):
    """GPT-2's linear layer, whose weight is [in, out], with a packed copy of it beside it."""

    def pack(self) -> None:
        """Pack the weight as it is now."""
        self.apply_packed = pack_linear(self.weight.T, self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer to [..., in]; returns [..., out]."""
        return super().forward(x) if torch.is_grad_enabled() else self.apply_packed(x)


PACKED: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: PackedLinear, Conv1D: PackedConv1D}
