"""T5's layers in fewer and larger operations, for training and encoding; names, weights and results are T5's.

On a GPU the time of a small model is the time to launch its kernels. transformers' T5 launches some 3,600 for a block
of the base size, forward and backward; these layers launch less than half:

* the layer norm is one operation, ``F.rms_norm``;
* GELU is one operation, with the tanh approximation that T5 v1.1 uses;
* position bias and mask are added once a stack, and every layer attends under the sum;
* the mask is made without asking the device whether there is padding, which would wait for it.

``make_lean(model)`` changes the classes of a model's modules in place, so that no weight is made twice and none is
renamed. What the training does not use (a cache, attention weights, hidden states) runs in transformers' own code.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 (the usual name)
from transformers.activations import NewGELUActivation
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPastAndCrossAttentions
from transformers.models.t5.modeling_t5 import T5Attention, T5LayerNorm, T5Stack
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

_SDPA = "sdpa"


def make_lean(model: nn.Module) -> None:
    """Let the T5 layers of a model compute in fewer operations, in place."""
    for module in model.modules():
        lean = _LEAN.get(type(module))
        if lean is not None:
            module.__class__ = lean
            if isinstance(module, LeanStack):  # transformers keeps by class what a model can return
                _CAN_RECORD_REGISTRY[module] = module._can_record_outputs
        elif isinstance(getattr(module, "act", None), NewGELUActivation):
            module.act = nn.GELU(approximate="tanh")


class LeanLayerNorm(T5LayerNorm):
    """T5's layer norm as one operation; the mean square is computed in float32."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Scale states [..., D] by their root mean square and the weight."""
        if hidden_states.dtype != self.weight.dtype:
            return super().forward(hidden_states)
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


class LeanAttention(T5Attention):
    """T5's attention under a bias that contains the mask."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        mask: torch.Tensor | None = None,
        key_value_states: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        past_key_values: Any = None,
        has_mask_in_bias: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As ``T5Attention.forward``.

        Args:
            hidden_states: [B, T, D].
            mask: of transformers; not used with ``has_mask_in_bias``.
            key_value_states: [B, S, D] of the source in cross-attention, else None.
            position_bias: additive, [B or 1, H or 1, T or 1, S] with ``has_mask_in_bias``.
            past_key_values: of transformers; None with ``has_mask_in_bias``.
            has_mask_in_bias: ``position_bias`` contains the mask, as ``LeanStack`` makes it.
            **kwargs: of transformers.
        """
        if not has_mask_in_bias:
            return super().forward(hidden_states, mask, key_value_states, position_bias, past_key_values, **kwargs)
        source = hidden_states if key_value_states is None else key_value_states
        attended = F.scaled_dot_product_attention(
            self._heads(self.q(hidden_states)),
            self._heads(self.k(source)),
            self._heads(self.v(source)),
            attn_mask=position_bias,
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.scaling,
        )
        return self.o(attended.transpose(1, 2).flatten(2)), position_bias, None

    def _heads(self, states: torch.Tensor) -> torch.Tensor:
        """[B, T, H * K] as [B, H, T, K]."""
        return states.unflatten(-1, (self.n_heads, self.key_value_proj_dim)).transpose(1, 2)


class LeanStack(T5Stack):
    """T5's encoder or decoder, with mask and position bias added once."""

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        use_cache: bool | None = None,
        inputs_embeds: torch.Tensor | None = None,
        media: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As ``T5Stack.forward``; ids [B, T] or embeddings [B, T, D] alone, without a cache, take the short way.

        ``media`` are passed on to blocks that read some (``mmcot/models/gated_t5.py``).
        """
        media_of_blocks = {} if media is None else {"media": media}
        has_one = (input_ids is None) != (inputs_embeds is None)
        is_plain = has_one and all(value is None for value in kwargs.values())
        has_cache = self.is_decoder and use_cache is not False
        if not is_plain or has_cache or self.config._attn_implementation != _SDPA or self._captures():
            return super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                use_cache=use_cache,
                inputs_embeds=inputs_embeds,
                **media_of_blocks,
                **kwargs,
            )
        hidden_BTD = self.dropout(self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds)
        own_bias = self._own_bias(hidden_BTD, attention_mask)
        cross_bias = None
        if encoder_hidden_states is not None:
            cross_bias = _cross_bias(encoder_hidden_states, encoder_attention_mask)
        for block in self.block:
            hidden_BTD, *_ = block(
                hidden_BTD,
                None,
                own_bias,
                encoder_hidden_states,
                None,
                cross_bias,
                has_mask_in_bias=True,
                **media_of_blocks,
            )
        hidden_BTD = self.dropout(self.final_layer_norm(hidden_BTD))
        outputs = BaseModelOutputWithPastAndCrossAttentions if self.is_decoder else BaseModelOutput
        return outputs(last_hidden_state=hidden_BTD)

    def _captures(self) -> bool:
        """Whether the configuration asks for attention weights or hidden states."""
        return bool(self.config.output_attentions or self.config.output_hidden_states)

    def _own_bias(self, hidden_BTD: torch.Tensor, mask_BT: torch.Tensor | None) -> torch.Tensor:
        """Position bias of the self-attention, lowest where a key may not be read, [B or 1, H, T, T]."""
        length, device = hidden_BTD.shape[1], hidden_BTD.device
        bias_1HTT = cast(Any, self.block)[0].layer[0].SelfAttention.compute_bias(length, length, device=device)
        may_read = None if mask_BT is None else mask_BT[:, None, None, :].bool()
        if self.is_decoder:
            causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
            may_read = causal if may_read is None else causal & may_read
        bias = bias_1HTT if may_read is None else torch.where(may_read, bias_1HTT, torch.finfo(bias_1HTT.dtype).min)
        return bias.contiguous()  # the memory-efficient attention of a GPU takes no other


def _cross_bias(states_BSD: torch.Tensor, mask_BS: torch.Tensor | None) -> torch.Tensor | None:
    """0 where a source state may be read, else the lowest number, [B, 1, 1, S]; None without a mask."""
    if mask_BS is None:
        return None
    bias_BS = torch.zeros(mask_BS.shape, dtype=states_BSD.dtype, device=states_BSD.device)
    return bias_BS.masked_fill_(mask_BS == 0, torch.finfo(states_BSD.dtype).min)[:, None, None, :]


_LEAN: dict[type, type] = {T5LayerNorm: LeanLayerNorm, T5Attention: LeanAttention, T5Stack: LeanStack}
