"""The gated cross-attention of a decoder's layers (``mmcot/models/gated.py``) as functions of one token per row.

Keys and values of a source's media are computed once, when a row is assigned to it.

Shape suffixes: B rows, L layers, H heads, E head width, D model width, N media of a source.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F  # noqa: N812 (the usual name)

from mmcot.models.gated import GatedCrossAttention
from mmcot.models.media_attention import ACTIVATIONS
from mmcot.models.packed_linear import pack_linear


class GatedLayers:
    """The gated cross-attention of each layer with packed weights, on the device and in the type of the model.

    Args:
        num_media: N.
    """

    def __init__(self, layers: Sequence[GatedCrossAttention], *, num_media: int) -> None:
        attention = layers[0].attention
        self.num_media, self.num_heads, self.head_width = num_media, attention.num_heads, attention.head_width
        self._layers = [_Layer(layer) for layer in layers]
        both = [linear.weight for layer in layers for linear in (layer.attention.k_proj, layer.attention.v_proj)]
        self._keys_values = pack_linear(torch.cat(both))

    def keys_values(self, media_ND: torch.Tensor) -> torch.Tensor:
        """Keys and values of media in all layers, [N, L, 2, H, E]; those of zeros are zeros."""
        return self._keys_values(media_ND).view(-1, len(self._layers), 2, self.num_heads, self.head_width)

    def read(
        self, number: int, hidden_BD: torch.Tensor, attend: Callable[[int, torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """The states [B, D] of the rows after the gated cross-attention before layer ``number``.

        Args:
            attend: returns what the queries [B, H, E] of a layer read of the rows' media, [B, H * E].
        """
        layer = self._layers[number]
        query_BHE = layer.query(layer.attention_norm(hidden_BD)).view(-1, self.num_heads, self.head_width)
        hidden_BD = hidden_BD + layer.output(attend(number, query_BHE))
        return hidden_BD + layer.inner_to_output(layer.activation(layer.inner(layer.feed_forward_norm(hidden_BD))))


class _Layer:
    """One layer's weights as functions of states [B, D]; the gates are in the weights."""

    def __init__(self, layer: GatedCrossAttention) -> None:
        self.attention_norm, self.feed_forward_norm = _norm(layer.attention_norm), _norm(layer.feed_forward_norm)
        self.query = pack_linear(layer.attention.q_proj.weight)
        self.output = pack_linear(layer.attention.out_proj.weight * layer.attention_gate.scale.tanh())
        self.inner = pack_linear(layer.feed_forward.fc1.weight)
        self.inner_to_output = pack_linear(layer.feed_forward.fc2.weight * layer.feed_forward_gate.scale.tanh())
        self.activation = ACTIVATIONS[layer.feed_forward.activation]


def _norm(norm: torch.nn.LayerNorm):
    weight, bias = norm.weight.detach(), norm.bias.detach()
    return lambda states_BD: F.layer_norm(states_BD, weight.shape, weight, bias, norm.eps)
