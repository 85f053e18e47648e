"""T5's decoder, one token per row and call, from the weights of a transformers model.

    decoder = StepDecoder(model, num_rows=32, max_source_tokens=512, max_new_tokens=256)
    decoder.admit([0], [states_SD])                  # assign row 0 to a source
    logits_BV = decoder.step([0], positions=[0])     # the start token, at position 0
    logits_BV = decoder.step([417], positions=[1])

Every row has its own position: T5's bias depends only on the distance between query and
key, so one row may start a new text while others are in the middle of theirs. Rows in use
are always the first ones. A row that ends is replaced by a new source (``admit``), or the last
row moves to its place (``move``). One decoder serves any number of texts, one set of sources after
the other: its weights are packed once. This module handles neither texts nor the end of a row.

Shape suffixes: B rows in use, H heads, K head width, D model width, S source positions,
T target positions, V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch.nn import functional as F  # noqa: N812 (the usual name)
from transformers import T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Attention, T5LayerNorm

from mmcot.errors import InputError
from mmcot.models.device import to_device
from mmcot.models.media_rows import MediaRows
from mmcot.models.packed_linear import Linear, pack_linear

# Rows that share an attention call on a CPU, padded to the longest of them. A call costs about
# as much as the padding of 4 rows: with fewer rows calls cost more, with more rows padding does.
ROWS_PER_ATTENTION = 4

# Columns of sources are allocated in multiples of this.
SOURCE_STEP = 64


class StepDecoder:
    """The decoder of ``model`` with the keys and values of ``num_rows`` rows.

    Args:
        max_source_tokens: columns that are allocated for a source; a longer one allocates more.
        max_new_tokens: tokens that a row can read.
    """

    @torch.inference_mode()
    def __init__(
        self, model: T5ForConditionalGeneration, *, num_rows: int, max_source_tokens: int, max_new_tokens: int
    ) -> None:
        config, stack = model.config, cast(Any, model.decoder)  # torch types no parts of a module
        if model.dtype == torch.float16:
            raise InputError("the model is in float16, in which T5 overflows; use float32 or bfloat16")
        self.num_rows, self.max_new_tokens = num_rows, max_new_tokens
        self.num_heads, self.head_width = config.num_heads, config.d_kv
        self.device, self.dtype = model.device, model.dtype
        configured = cast(Any, model.generation_config).decoder_start_token_id
        self.start_token: int = config.decoder_start_token_id if configured is None else configured
        self.rows_per_attention = ROWS_PER_ATTENTION if self.device.type == "cpu" else num_rows
        self.embeddings = stack.embed_tokens.weight
        self.layers = [_Layer(block) for block in stack.block]
        self.final_norm = _norm(stack.final_layer_norm)
        self.output_scale = config.d_model**-0.5 if config.scale_decoder_outputs else 1.0
        self.vocab_size = model.lm_head.weight.shape[0]
        self.lm_head = pack_linear(model.lm_head.weight)
        self.cross_keys_values = pack_linear(
            torch.cat([w for block in stack.block for w in _weights(block.layer[1].EncDecAttention, "kv")])
        )
        shape = (len(self.layers), 2, num_rows, self.num_heads)
        like = {"device": self.device, "dtype": self.dtype}
        # Zeros, not uninitialised memory: masked columns are multiplied by 0, and 0 * NaN is NaN.
        self.own_L2BHTK = torch.zeros(*shape, max_new_tokens, self.head_width, **like)
        self.cross_L2BHSK = torch.zeros(*shape, max_source_tokens, self.head_width, **like)
        self.source_lengths = [0] * num_rows
        self.num_written = [0] * num_rows  # columns of a row's own cache that may hold something; the others are 0
        self._cross_groups: list[Group] | None = None
        self._own_flat = [layer.view(-1, self.head_width) for layer in self.own_L2BHTK]
        self._first_column_2BH = (
            torch.arange(2 * num_rows * self.num_heads, device=self.device).view(2, num_rows, -1) * max_new_tokens
        )
        self._reversed_bias_HT = self._reverse_bias(stack.block[0].layer[0].SelfAttention)
        self.media: MediaRows | None = None
        if gated := [block.gated for block in stack.block if hasattr(block, "gated")]:
            self.media = MediaRows(gated, num_rows=num_rows, num_media=stack.num_media)

    def _reverse_bias(self, attention: T5Attention) -> torch.Tensor:
        """Bias of the last position to every other, [H, 2T - 1], and -inf for later positions.

        A window that starts at column T - 1 - p is the bias of position p to positions 0, 1, ...
        """
        last = self.max_new_tokens - 1
        bias_HT = attention.compute_bias(1, last + 1, device=self.device, past_seen_tokens=last)[0, :, 0]
        future_HT = bias_HT.new_full((self.num_heads, last), float("-inf"))
        return torch.cat([bias_HT, future_HT], dim=1).to(self.dtype)

    @torch.inference_mode()
    def admit(self, rows: Sequence[int], states: Sequence[Any]) -> list[int]:
        """Assign each of ``rows`` to a source's encoder states [S, D]; returns the token each reads at position 0.

        What a row held before is cleared: it may be NaN, which a mask does not hide.

        Args:
            states: for a decoder with gated cross-attention ``MediaOfSource``.
        """
        states = self.admit_media(rows, states)
        for row, states_SD in zip(rows, states, strict=True):
            self._admit(row, states_SD)
        self._cross_groups = None
        return [self.start_token] * len(rows)

    def admit_media(self, rows: Sequence[int], states: Sequence[Any]) -> Sequence[torch.Tensor]:
        """Assign the media of sources to rows where layers read some; returns the states of the texts."""
        return states if self.media is None else self.media.admit(rows, states)

    def _admit(self, row: int, states_SD: torch.Tensor) -> None:
        length = len(states_SD)
        self._clear(row, num_positions=0, length=length)
        if length > self.cross_L2BHSK.shape[4]:
            self._widen(length)
        keys_values = self.cross_keys_values(states_SD).view(
            length, len(self.layers), 2, self.num_heads, self.head_width
        )
        self.cross_L2BHSK[:, :, row, :, :length] = keys_values.permute(1, 2, 3, 0, 4)
        self.source_lengths[row] = length

    def admit_at_once(self, rows: Sequence[int], states: Sequence[torch.Tensor]) -> None:
        """The same in a few operations for all rows together, where launching an operation is what costs.

        Args:
            rows: different ones.
            states: of at most as many tokens as this decoder was opened for.
        """
        lengths = [len(states_SD) for states_SD in states]
        columns = np.concatenate([np.arange(length) for length in lengths])
        rows_N, columns_N = to_device(np.stack([np.repeat(rows, lengths), columns]), self.device)
        rows_R = to_device(np.array(rows), self.device)
        self.own_L2BHTK.index_fill_(2, rows_R, 0)
        self.cross_L2BHSK.index_fill_(2, rows_R, 0)
        keys_values = self.cross_keys_values(torch.cat(list(states))).view(
            len(columns), len(self.layers), 2, self.num_heads, self.head_width
        )
        self.cross_L2BHSK[:, :, rows_N, :, columns_N] = keys_values
        for row, length in zip(rows, lengths, strict=True):
            self.source_lengths[row], self.num_written[row] = length, 0
        self._cross_groups = None

    def _clear(self, row: int, *, num_positions: int, length: int) -> None:
        """Write zeros to what ``row`` holds beyond so many positions of its text and of its source."""
        self.own_L2BHTK[:, :, row, :, num_positions : self.num_written[row]] = 0
        self.cross_L2BHSK[:, :, row, :, length : self.source_lengths[row]] = 0
        self.num_written[row] = num_positions

    def _widen(self, length: int) -> None:
        """Allocate columns for a source of ``length`` tokens; the rows in use keep theirs."""
        before = self.cross_L2BHSK
        num_columns = -(-length // SOURCE_STEP) * SOURCE_STEP
        self.cross_L2BHSK = before.new_zeros(*before.shape[:4], num_columns, self.head_width)
        self.cross_L2BHSK[..., : before.shape[4], :] = before

    @torch.inference_mode()
    def move(self, row: int, *, to: int, num_positions: int) -> None:
        """Copy the source and the first ``num_positions`` tokens of ``row`` to the row ``to``."""
        length = self.source_lengths[row]
        self._clear(to, num_positions=num_positions, length=length)
        self.source_lengths[to] = length
        self.own_L2BHTK[:, :, to, :, :num_positions] = self.own_L2BHTK[:, :, row, :, :num_positions]
        self.cross_L2BHSK[:, :, to, :, :length] = self.cross_L2BHSK[:, :, row, :, :length]
        if self.media is not None:
            self.media.move(row, to=to)
        self._cross_groups = None

    @torch.inference_mode()
    def step(self, token_ids: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """Read one more token in each of the first ``len(token_ids)`` rows.

        Args:
            token_ids: the token of each row.
            positions: the token's position, 0 for a row's first; the row has read all earlier ones.

        Returns:
            logits [B, V] of the next token.
        """
        num_rows = len(token_ids)
        for row, position in enumerate(positions):
            self.num_written[row] = max(self.num_written[row], position + 1)
        ids_B, positions_B = torch.tensor([token_ids, positions], device=self.device)
        if self._cross_groups is None or self._cross_groups[-1].stop != num_rows:
            self._cross_groups = self._group_sources(num_rows)
        bias_BH1T = self.bias_to_past(positions_B, max(positions) + 1)
        own_groups = [
            Group(start, stop, width, bias_BH1T[start:stop, ..., :width])
            for start, stop, width in self._spans([position + 1 for position in positions])
        ]
        return self.run(ids_B, positions_B, own_groups, self._cross_groups)

    def run(
        self, ids_B: torch.Tensor, positions_B: torch.Tensor, own_groups: list[Group], cross_groups: list[Group]
    ) -> torch.Tensor:
        """Compute a step when the attended columns are known: tensor operations alone."""
        num_rows, width = len(ids_B), self.num_heads * self.head_width
        columns = (self._first_column_2BH[:, :num_rows] + positions_B[:, None]).flatten()
        hidden_BD = F.embedding(ids_B, self.embeddings)
        for number, layer in enumerate(self.layers):
            if self.media is not None:
                hidden_BD = self.media.read(number, hidden_BD)
            qkv_B3HK = layer.qkv(layer.own_norm(hidden_BD)).view(num_rows, 3, self.num_heads, self.head_width)
            self._own_flat[number].index_copy_(0, columns, qkv_B3HK[:, 1:].transpose(0, 1).reshape(-1, self.head_width))
            attended = _attend(qkv_B3HK[:, 0, :, None], self.own_L2BHTK[number], own_groups)
            hidden_BD = hidden_BD + layer.own_output(attended.reshape(num_rows, width))
            query_BH1K = layer.cross_query(layer.cross_norm(hidden_BD)).view(
                num_rows, self.num_heads, 1, self.head_width
            )
            attended = _attend(query_BH1K, self.cross_L2BHSK[number], cross_groups)
            hidden_BD = hidden_BD + layer.cross_output(attended.reshape(num_rows, width))
            hidden_BD = hidden_BD + layer.feed_forward(layer.feed_forward_norm(hidden_BD))
        return self.lm_head(self.final_norm(hidden_BD) * self.output_scale)

    def bias_to_past(self, positions_B: torch.Tensor, width: int) -> torch.Tensor:
        """Additive mask [B, H, 1, width]: T5's bias for the positions a row has read, -inf for the rest."""
        windows = self._reversed_bias_HT.unfold(1, width, 1)
        return windows.index_select(1, self.max_new_tokens - 1 - positions_B).transpose(0, 1).unsqueeze(2)

    def _group_sources(self, num_rows: int) -> list[Group]:
        lengths = self.source_lengths[:num_rows]
        lengths_B111 = torch.tensor(lengths, device=self.device).view(-1, 1, 1, 1)
        columns = torch.arange(max(lengths), device=self.device)
        mask_B11S = torch.zeros(num_rows, 1, 1, max(lengths), dtype=self.dtype, device=self.device)
        mask_B11S.masked_fill_(columns >= lengths_B111, float("-inf"))
        return [
            Group(start, stop, width, None if min(lengths[start:stop]) == width else mask_B11S[start:stop, ..., :width])
            for start, stop, width in self._spans(lengths)
        ]

    def _spans(self, widths: list[int]) -> list[tuple[int, int, int]]:
        size = self.rows_per_attention
        return [(i, min(i + size, len(widths)), max(widths[i : i + size])) for i in range(0, len(widths), size)]


class Group:
    """Rows ``start:stop``, which attend ``width`` columns under an additive mask [b, H or 1, 1, width]."""

    __slots__ = ("mask", "start", "stop", "width")

    def __init__(self, start: int, stop: int, width: int, mask: torch.Tensor | None) -> None:
        self.start, self.stop, self.width, self.mask = start, stop, width, mask


class _Layer:
    """One block's weights as functions of states [B, D]."""

    def __init__(self, block: Any) -> None:  # a T5Block
        own, cross, feed_forward = block.layer
        self.own_norm, self.cross_norm, self.feed_forward_norm = (_norm(part.layer_norm) for part in block.layer)
        self.qkv = pack_linear(torch.cat(_weights(own.SelfAttention, "qkv")))
        self.own_output = pack_linear(own.SelfAttention.o.weight)
        self.cross_query = pack_linear(cross.EncDecAttention.q.weight)
        self.cross_output = pack_linear(cross.EncDecAttention.o.weight)
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


def _attend(query_BH1K: torch.Tensor, keys_values_2BHTK: torch.Tensor, groups: list[Group]) -> torch.Tensor:
    """T5's attention, unscaled, group by group; returns [B, H, 1, K]."""
    keys_BHTK, values_BHTK = keys_values_2BHTK.unbind(0)
    attended = [
        F.scaled_dot_product_attention(
            query_BH1K[group.start : group.stop],
            keys_BHTK[group.start : group.stop, :, : group.width],
            values_BHTK[group.start : group.stop, :, : group.width],
            attn_mask=group.mask,
            scale=1.0,
        )
        for group in groups
    ]
    return attended[0] if len(attended) == 1 else torch.cat(attended)
