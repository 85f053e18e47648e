"""The gated cross-attention of a decoder's layers (``mmcot/models/gated.py``) for rows that are decoded together.

Keys and values of a row's media are computed when its source is admitted. Shapes are fixed, so that a GPU can replay
the operations as a graph.

Shape suffixes: B rows, R rows that are admitted, L layers, H heads, E head width, D model width, N media of a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F  # noqa: N812 (the usual name)

from mmcot.models.device import to_device
from mmcot.models.gated import GatedCrossAttention
from mmcot.models.gated_t5 import MediaOfSource
from mmcot.models.media_attention import ACTIVATIONS
from mmcot.models.packed_linear import pack_linear


class MediaRows:
    """The media of ``num_rows`` rows and the layers that read them.

    Args:
        layers: the gated cross-attention of each layer, on the device and in the type of the model.
        num_media: N.
    """

    def __init__(self, layers: Sequence[GatedCrossAttention], *, num_rows: int, num_media: int) -> None:
        attention, weight = layers[0].attention, layers[0].attention.k_proj.weight
        self._layers = [_Layer(layer) for layer in layers]
        self._sizes = (len(layers), 2, attention.num_heads, attention.head_width)
        both = [linear.weight for layer in layers for linear in (layer.attention.k_proj, layer.attention.v_proj)]
        self._keys_values = pack_linear(torch.cat(both))
        num_layers, _, num_heads, head_width = self._sizes
        self._cache_L2BHNE = weight.new_zeros(num_layers, 2, num_rows, num_heads, num_media, head_width)
        self._mask_B11N = weight.new_zeros(num_rows, 1, 1, num_media)

    def admit(self, rows: Sequence[int], sources: Sequence[MediaOfSource]) -> list[torch.Tensor]:
        """Assign each of some rows to a source's media; returns the states of the texts [S, D].

        A row without media gets zeros as keys and values, so that it reads zeros.
        """
        media_RND = torch.stack([source.media for source in sources])
        mask_RN = torch.stack([source.mask for source in sources])
        has_media_R1 = mask_RN.any(dim=1, keepdim=True)
        rows_R = to_device(np.array(rows), media_RND.device)
        kv_RNL2HE = self._keys_values((media_RND * has_media_R1[..., None]).flatten(0, 1)).view(
            *media_RND.shape[:2], *self._sizes
        )
        self._cache_L2BHNE.index_copy_(2, rows_R, kv_RNL2HE.permute(2, 3, 0, 4, 1, 5))
        mask_R11N = torch.zeros_like(self._mask_B11N[: len(rows)])
        mask_R11N.masked_fill_(~(mask_RN | ~has_media_R1)[:, None, None], float("-inf"))
        self._mask_B11N.index_copy_(0, rows_R, mask_R11N)
        return [source.text for source in sources]

    def move(self, row: int, *, to: int) -> None:
        """Copy the media of ``row`` to the row ``to``."""
        self._cache_L2BHNE[:, :, to] = self._cache_L2BHNE[:, :, row]
        self._mask_B11N[to] = self._mask_B11N[row]

    def read(self, number: int, hidden_BD: torch.Tensor) -> torch.Tensor:
        """The states [B, D] of the first rows after the gated cross-attention before layer ``number``."""
        layer, (_, _, num_heads, head_width), num_rows = self._layers[number], self._sizes, len(hidden_BD)
        keys_BHNE, values_BHNE = self._cache_L2BHNE[number, :, :num_rows].unbind(0)
        query_BH1E = layer.query(layer.attention_norm(hidden_BD)).view(num_rows, num_heads, 1, head_width)
        attended_BH1E = F.scaled_dot_product_attention(
            query_BH1E, keys_BHNE, values_BHNE, attn_mask=self._mask_B11N[:num_rows]
        )
        hidden_BD = hidden_BD + layer.output(attended_BH1E.reshape(num_rows, -1))
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
