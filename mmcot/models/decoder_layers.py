"""The weights of T5's decoder as functions of one token per row, prepared once for many steps.

    layers = DecoderLayers(model)
    logits_BV = layers.next_logits(ids_B, attention)

Where keys and values are stored, and which of them a row attends, is the part of ``attention``: ``RowCaches``
(``mmcot/models/row_attention.py``) on a CPU, ``StaticAttention`` (``mmcot/models/static_rows.py``) in a CUDA graph.

Shape suffixes: B rows, H heads, K head width, D model width, S source positions, T target positions, V vocabulary,
L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
from torch.nn import functional as F  # noqa: N812 (the usual name)
from transformers import T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Attention, T5LayerNorm

from mmcot.errors import InputError
from mmcot.models.gated_layers import GatedLayers
from mmcot.models.packed_linear import Linear, pack_linear


class Attention(Protocol):
    """What the rows have stored, and how a query of each row reads it; each result is [B, H * K]."""

    def own(self, number: int, query_BHK: torch.Tensor, keys_values_B2HK: torch.Tensor) -> torch.Tensor:
        """Store the keys and values of the rows' new tokens in a layer, then attend to each row's tokens."""
        ...

    def source(self, number: int, query_BHK: torch.Tensor) -> torch.Tensor:
        """Attend to each row's source."""
        ...

    def media(self, number: int, query_BHE: torch.Tensor) -> torch.Tensor:
        """Attend to the media of each row's source; scores are scaled by E ** -0.5, E the head width."""
        ...


class DecoderLayers:
    """The decoder of ``model`` with packed weights; the model's weights must not change afterwards."""

    @torch.inference_mode()
    def __init__(self, model: T5ForConditionalGeneration) -> None:
        config, stack = model.config, cast(Any, model.decoder)  # torch types no parts of a module
        if model.dtype == torch.float16:
            raise InputError("the model is in float16, in which T5 overflows; use float32 or bfloat16")
        self.num_heads, self.head_width = config.num_heads, config.d_kv
        self.device, self.dtype = model.device, model.dtype
        configured = cast(Any, model.generation_config).decoder_start_token_id
        self.start_token: int = config.decoder_start_token_id if configured is None else configured
        self.vocab_size = model.lm_head.weight.shape[0]
        self.gated: GatedLayers | None = None
        if gated := [block.gated for block in stack.block if hasattr(block, "gated")]:
            self.gated = GatedLayers(gated, num_media=stack.num_media)
        self._embeddings = stack.embed_tokens.weight
        self._layers = [_Layer(block) for block in stack.block]
        self.num_layers = len(self._layers)
        self._final_norm = _norm(stack.final_layer_norm)
        self._output_scale = config.d_model**-0.5 if config.scale_decoder_outputs else 1.0
        self._lm_head = pack_linear(model.lm_head.weight)
        self._source_keys_values = pack_linear(
            torch.cat([w for block in stack.block for w in _weights(block.layer[1].EncDecAttention, "kv")])
        )
        self._compute_bias: Callable[..., torch.Tensor] = stack.block[0].layer[0].SelfAttention.compute_bias

    def next_logits(self, ids_B: torch.Tensor, attention: Attention) -> torch.Tensor:
        """Read a token in each row; returns logits [B, V] of the next."""
        num_rows = len(ids_B)
        hidden_BD = F.embedding(ids_B, self._embeddings)
        for number, layer in enumerate(self._layers):
            if self.gated is not None:
                hidden_BD = self.gated.read(number, hidden_BD, attention.media)
            qkv_B3HK = layer.qkv(layer.own_norm(hidden_BD)).view(num_rows, 3, self.num_heads, self.head_width)
            hidden_BD = hidden_BD + layer.own_output(attention.own(number, qkv_B3HK[:, 0], qkv_B3HK[:, 1:]))
            query_BHK = layer.source_query(layer.source_norm(hidden_BD)).view(num_rows, self.num_heads, -1)
            hidden_BD = hidden_BD + layer.source_output(attention.source(number, query_BHK))
            hidden_BD = hidden_BD + layer.feed_forward(layer.feed_forward_norm(hidden_BD))
        return self._lm_head(self._final_norm(hidden_BD) * self._output_scale)

    def source_keys_values(self, states_SD: torch.Tensor) -> torch.Tensor:
        """Keys and values of a source's states in all layers, [S, L, 2, H, K]."""
        return self._source_keys_values(states_SD).view(-1, self.num_layers, 2, self.num_heads, self.head_width)

    def reversed_bias(self, num_positions: int) -> torch.Tensor:
        """Bias of the last of T positions to every other, [H, 2T - 1], and -inf for later positions.

        A window that starts at column T - 1 - p is the bias of position p to positions 0, 1, ...
        """
        last = num_positions - 1
        bias_HT = self._compute_bias(1, last + 1, device=self.device, past_seen_tokens=last)[0, :, 0]
        future_HT = bias_HT.new_full((self.num_heads, last), float("-inf"))
        return torch.cat([bias_HT, future_HT], dim=1)


class _Layer:
    """One block's weights as functions of states [B, D]."""

    def __init__(self, block: Any) -> None:  # a T5Block
        own, source, feed_forward = block.layer
        self.own_norm, self.source_norm, self.feed_forward_norm = (_norm(part.layer_norm) for part in block.layer)
        self.qkv = pack_linear(torch.cat(_weights(own.SelfAttention, "qkv")))
        self.own_output = pack_linear(own.SelfAttention.o.weight)
        self.source_query = pack_linear(source.EncDecAttention.q.weight)
        self.source_output = pack_linear(source.EncDecAttention.o.weight)
        self.feed_forward = _feed_forward(feed_forward.DenseReluDense)


def _weights(attention: T5Attention, names: str) -> list[torch.Tensor]:
    return [getattr(attention, name).weight for name in names]


def _norm(norm: T5LayerNorm) -> Linear:
    """T5's layer norm: scale without shift; the mean square is computed in float32."""
    weight, epsilon = norm.weight.detach(), norm.variance_epsilon
    return lambda states_BD: F.rms_norm(states_BD, weight.shape, weight, epsilon)


def _feed_forward(module: Any) -> Linear:  # a T5DenseActDense or T5DenseGatedActDense
    activation, output, output_dtype = module.act, pack_linear(module.wo.weight), module.wo.weight.dtype
    if not hasattr(module, "wi_0"):
        inner = pack_linear(module.wi.weight)
        return lambda states_BD: output(activation(inner(states_BD)).to(output_dtype))
    both = pack_linear(torch.cat([module.wi_0.weight, module.wi_1.weight]))

    def gated(states_BD: torch.Tensor) -> torch.Tensor:
        gate, linear = both(states_BD).chunk(2, dim=-1)
        return output((activation(gate) * linear).to(output_dtype))

    return gated
