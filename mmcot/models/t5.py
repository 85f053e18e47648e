"""The fused model: T5 with a fusion of its encoder states and vision features.

``T5ForMultimodalGeneration`` is a ``T5ForConditionalGeneration`` with one more input:

    model = T5ForMultimodalGeneration.from_pretrained("runs/demo/rationale/model")
    model(input_ids=..., attention_mask=..., vision_features=x_BPV, labels=...).loss
    model.generate(input_ids, attention_mask=..., vision_features=x_BPV)

The fusion (a bridge of ``mmcot/models/fusion.py``) is inside the encoder, after its final layer norm
and dropout, so that cached and uncached decoding agree. Without ``vision_features`` the model is a plain T5.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from transformers import T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from mmcot.errors import InputError
from mmcot.models.attention_start import start_with_lookup
from mmcot.models.bridge import AttentionMaps, Bridge
from mmcot.models.bridge_start import BridgeInitializer, mark_bridge_parts
from mmcot.models.cuda_graphs import StaticDecoder, open_decoder
from mmcot.models.distance_bias import init_distance_bias
from mmcot.models.flops import forward_flops
from mmcot.models.gated import GatedCrossAttention, gate_openings
from mmcot.models.gated_t5 import add_gated_layers
from mmcot.models.lean_t5 import LeanStack, make_lean
from mmcot.models.loss import chunked_loss_sum, is_long, token_loss_sum
from mmcot.models.media import MediaBridge, MediaTokens
from mmcot.models.packed_modules import packed
from mmcot.models.source_states import states_to_read
from mmcot.models.step_decoder import StepDecoder
from mmcot.models.t5_config import MultimodalT5Config, open_bridge


@dataclasses.dataclass
class FusedStates(BaseModelOutput):
    """States of a bridge that has a mask of its own, ``states_mask`` [B, N]."""

    states_mask: torch.Tensor | None = None


class FusedEncoder(BridgeInitializer, LeanStack):
    """T5's encoder stack with a fusion of vision features at its end.

    The parts of the published gate are registered directly in the stack, because published checkpoints name
    them ``encoder.image_dense``, ``encoder.mha_layer`` and ``encoder.gate_dense``.
    """

    def __init__(self, config: MultimodalT5Config) -> None:
        super().__init__(config)
        fusion = open_bridge(config)
        mark_bridge_parts(fusion)
        parts = dict(fusion.named_children()) if fusion.parts_in_encoder else {"bridge": fusion}
        self.fusion_parts = list(parts)
        for name, part in parts.items():
            self.add_module(name, part)
        self.put_fusion(fusion)
        self.post_init()

    def put_fusion(self, fusion: Bridge) -> None:
        """Set what ``forward`` calls; its parts are those of this stack."""
        self._fusion = (fusion,)  # in a tuple, so that its parts are registered once

    @property
    def fusion(self) -> Bridge:
        """The fusion, a kind of ``BRIDGES``; its parts are this stack's own."""
        return self._fusion[0]

    def forward(self, input_ids=None, attention_mask=None, vision_features=None, vision_mask=None, **kwargs):
        """Run T5's encoder, then the fusion where ``vision_features`` are given.

        Args:
            input_ids: [B, S].
            attention_mask: [B, S], 0 at padding.
            vision_features: [B, P, V].
            vision_mask: bool [B, P]; used only if the configuration sets ``mask_absent_patches``.
            **kwargs: as ``T5Stack.forward``.

        Raises:
            ValueError: the features have another shape than the configured one.
        """
        if self.fusion.in_embeddings and vision_features is not None:
            embeddings = self._with_media(input_ids, attention_mask, vision_features, vision_mask)
            return super().forward(inputs_embeds=embeddings, attention_mask=attention_mask, **kwargs)
        outputs = super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        if vision_features is None and not self.fusion.in_layers:
            return outputs
        text_BSD = outputs[0]
        text_mask_BS = text_BSD.new_ones(text_BSD.shape[:2]).long() if attention_mask is None else attention_mask
        mask_BP = None if vision_features is None else self._check_vision(vision_features, vision_mask)
        fused, mask_BN = self.fusion(text_BSD, text_mask_BS, vision_features, mask_BP)
        expected = self.fusion.num_states(text_BSD.shape[1], self.config.vision_num_patches)
        if fused.shape[1] != expected or mask_BN.shape != fused.shape[:2]:
            raise InputError(
                f"{type(self.fusion).__name__} returned states {tuple(fused.shape)} with mask {tuple(mask_BN.shape)}, "
                f"its num_states says {expected} states; let them agree"
            )
        if mask_BN is not text_mask_BS:
            if isinstance(outputs, tuple):
                raise InputError(f"{type(self.fusion).__name__} has a mask of its own; call without return_dict=False")
            return FusedStates(fused, outputs.hidden_states, outputs.attentions, mask_BN)
        if isinstance(outputs, tuple):
            return (fused, *outputs[1:])
        outputs.last_hidden_state = fused
        return outputs

    def _with_media(self, ids_BS, mask_BS, vision_BPV, vision_mask_BP) -> torch.Tensor:
        """The embeddings of a source, with media at its placeholders."""
        self._check_vision(vision_BPV, vision_mask_BP)
        is_placeholder_BS = ids_BS == self.config.pad_token_id
        if mask_BS is not None:
            is_placeholder_BS &= mask_BS.bool()
        bridge = cast(MediaTokens, self.fusion)
        return bridge.place(self.embed_tokens(ids_BS), is_placeholder_BS, vision_BPV, vision_mask_BP)

    @torch.no_grad()
    def attention_maps(self, input_ids, attention_mask, vision_features, vision_mask=None) -> AttentionMaps | None:
        """The bridge's maps; arguments as for ``forward``."""
        if isinstance(self.fusion, MediaBridge):
            self._check_vision(vision_features, vision_mask)
            return self.fusion.media_maps(vision_features, vision_mask)
        text_BSD = super().forward(input_ids=input_ids, attention_mask=attention_mask)[0]
        mask_BP = self._check_vision(vision_features, vision_mask)
        return self.fusion.attention_maps(text_BSD, attention_mask, vision_features, mask_BP)

    def _check_vision(self, vision_features: torch.Tensor, vision_mask: torch.Tensor | None) -> torch.Tensor | None:
        """Check the features' shape; returns the mask that the bridge sees."""
        expected = (self.config.vision_num_patches, self.config.vision_dim)
        # Attention to one pooled vector equals attention to any number of its copies.
        if tuple(vision_features.shape[1:]) not in (expected, (1, expected[1])):
            raise InputError(
                f"vision_features have shape {tuple(vision_features.shape)}, this model expects [batch, "
                f"{expected[0]}, {expected[1]}]; use the features it was trained on"
            )
        return vision_mask if self.config.mask_absent_patches or self.fusion.in_layers else None


class T5ForMultimodalGeneration(BridgeInitializer, T5ForConditionalGeneration):
    """T5 with a fused encoder (arXiv:2302.00923); loads and saves as any transformers model."""

    config_class = MultimodalT5Config
    _keys_to_ignore_on_load_unexpected = [r"^matching\."]  # noqa: RUF012 (transformers reads it from the class)

    def __init__(self, config: MultimodalT5Config) -> None:
        if not config.is_tied:
            tied = dict(type(self)._tied_weights_keys)
            tied.pop("lm_head.weight")
            self._tied_weights_keys = tied
        super().__init__(config)
        self.encoder = FusedEncoder(cast(MultimodalT5Config, self.encoder.config))
        make_lean(self)
        self._gated: list[GatedCrossAttention] = []
        if config.inject == "layers":
            add_gated_layers(self.decoder, config)
            self._gated = [cast(Any, block).gated for block in self.decoder.block]
            mark_bridge_parts(*self._gated)
        self.post_init()

    @classmethod
    def start(
        cls,
        shape: Mapping[str, Any],
        vision: Mapping[str, Any],
        *,
        pad_token_id: int,
        eos_token_id: int,
        distance_bias: float = 0.0,
        near_bias: float = 0.0,
        match_score: float = 0.0,
    ) -> T5ForMultimodalGeneration:
        """A model with random weights, from torch's current seed.

        Args:
            shape: sizes, by their names in ``T5Config``.
            vision: what ``MultimodalT5Config`` adds.
            distance_bias: see ``mmcot/models/distance_bias.py``; 0 for none.
            near_bias: see ``mmcot/models/attention_start.py``, with ``match_score``; 0 for none.
        """
        tokens = {"pad_token_id": pad_token_id, "eos_token_id": eos_token_id, "decoder_start_token_id": pad_token_id}
        model = cls._from_config(MultimodalT5Config(**tokens, **shape, **vision))
        if distance_bias:
            init_distance_bias(model, distance_bias)
        if near_bias:
            start_with_lookup(model, near_bias=near_bias, match_score=match_score)
        return model

    @property
    def new_parts(self) -> tuple[str, ...]:
        """Prefixes of the names of parameters that are not the pretrained language model's."""
        in_encoder = (f"encoder.{name}." for name in self.encoder.fusion_parts)
        return (*in_encoder, *(f"decoder.block.{number}.gated." for number in range(len(self._gated))))

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_outputs=None,
        vision_features: torch.Tensor | None = None,
        vision_mask: torch.Tensor | None = None,
        summed_labels: torch.Tensor | None = None,
        **kwargs,
    ):
        """Run encoder, fusion and decoder.

        Args:
            input_ids: [B, S].
            attention_mask: [B, S], 0 at padding.
            encoder_outputs: fused states of an earlier call, instead of encoding again.
            vision_features: [B, P, V] of the configured shape; zeros where there is no picture.
            vision_mask: bool [B, P], False where a patch is absent; used only if the
                configuration sets ``mask_absent_patches``.
            summed_labels: [B, T], -100 where there is no target; the output's ``loss`` is then the sum of their
                cross-entropies, and of many labels there are no ``logits`` (``mmcot/models/loss.py``).
            **kwargs: as ``T5ForConditionalGeneration.forward`` (labels, decoder_input_ids, ...).

        Raises:
            ValueError: the features' shape is not the configured one.
        """
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                vision_features=vision_features,
                vision_mask=vision_mask,
            )
        if isinstance(encoder_outputs, FusedStates):
            attention_mask = encoder_outputs.states_mask
        # Under ZeRO-3 every call of lm_head gathers it, so that all ranks must call it equally often.
        is_whole = not hasattr(self.lm_head.weight, "ds_id")
        if summed_labels is not None and is_whole and is_long(summed_labels.numel(), self.config.vocab_size):
            return self._long_loss(encoder_outputs[0], attention_mask, kwargs["decoder_input_ids"], summed_labels)
        outputs = super().forward(
            input_ids=input_ids, attention_mask=attention_mask, encoder_outputs=cast(Any, encoder_outputs), **kwargs
        )
        if summed_labels is not None:
            outputs.loss = cast(Any, token_loss_sum(cast(torch.Tensor, outputs.logits), summed_labels))
        return outputs

    def _long_loss(
        self, states_BND: torch.Tensor, mask_BN: torch.Tensor | None, ids_BT: torch.Tensor, labels_BT: torch.Tensor
    ) -> Seq2SeqLMOutput:
        """The summed loss without all logits in memory."""
        states_BTD = self.decoder(
            input_ids=ids_BT, encoder_hidden_states=states_BND, encoder_attention_mask=mask_BN, use_cache=False
        )[0]
        if self.config.scale_decoder_outputs:
            states_BTD = states_BTD * self.config.d_model**-0.5
        loss = chunked_loss_sum(states_BTD, labels_BT, self.lm_head, self.config.vocab_size)
        return Seq2SeqLMOutput(loss=cast(Any, loss))

    def read(self, **inputs: torch.Tensor) -> list[Any]:
        """Encode and fuse; the states of each row that the decoder may read, [N, D], or text and media apart.

        Arguments as for ``forward``, on the host or on the model's device.
        """
        return self._read(self.encoder, inputs)

    def open_reader(self) -> Callable[..., list[Any]]:
        """``read`` with weights prepared for many calls; the weights must not change afterwards.

        On a CPU the linear layers of encoder and bridge are packed, which takes their memory once more.
        """
        if self.device.type != "cpu":
            return self.read
        # Together, so that the parts of the published gate, which stand in both, are packed once.
        encoder, fusion = packed(torch.nn.ModuleList([self.encoder, cast(FusedEncoder, self.encoder).fusion]))
        encoder.put_fusion(fusion)
        return lambda **inputs: self._read(encoder, inputs)

    def _read(self, encoder: Callable[..., Any], inputs: Mapping[str, torch.Tensor]) -> list[Any]:
        num_media = cast(Any, self.decoder).num_media if self._gated else None
        return states_to_read(encoder, inputs, self.device, num_media)

    def open_decoder(
        self, *, num_rows: int, max_source_tokens: int, max_new_tokens: int
    ) -> StepDecoder | StaticDecoder:
        """A decoder of ``num_rows`` rows for states that ``read`` returns for sources up to this length."""
        encoder = cast(FusedEncoder, self.encoder)
        num_states = max_source_tokens
        if not encoder.fusion.in_layers:
            num_states = encoder.fusion.num_states(max_source_tokens, self.config.vision_num_patches)
        return open_decoder(self, num_rows=num_rows, max_source_tokens=num_states, max_new_tokens=max_new_tokens)

    def forward_flops(self, source_lengths: Sequence[int], target_lengths: Sequence[int], *, num_patches: int) -> float:
        """Operations of a forward pass without padding; see ``mmcot/models/flops.py``."""
        bridge = cast(FusedEncoder, self.encoder).fusion
        own = forward_flops(self.config, source_lengths, target_lengths, num_patches=num_patches, bridge=bridge)
        num_media = bridge.num_states(0, num_patches) if num_patches else 0
        return own + sum(gated.forward_flops(t, num_media) for gated in self._gated for t in target_lengths)

    def attention_maps(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        vision_features: torch.Tensor,
        vision_mask: torch.Tensor | None = None,
    ) -> AttentionMaps | None:
        """Run the encoder and measure its bridge; None if this kind has no maps. Arguments as for ``forward``."""
        return cast(FusedEncoder, self.encoder).attention_maps(input_ids, attention_mask, vision_features, vision_mask)

    def observe(self, inputs: Mapping[str, torch.Tensor] | None) -> None:
        """Measure for ``watch`` in the forward passes of these inputs, or in none."""
        cast(FusedEncoder, self.encoder).fusion.observe(inputs)
        for gated in self._gated:
            gated.observe(inputs is not None)

    def watch(self) -> dict[str, float]:
        """What bridge and gates measured since the last call, by the name of a metric."""
        return cast(FusedEncoder, self.encoder).fusion.watch() | gate_openings(self._gated)
