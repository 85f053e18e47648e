"""Any causal language model of transformers, one token per row and call, every row at a position of its own.

    decoder = CausalStepDecoder(model, num_rows=64, max_source_tokens=512, max_new_tokens=256)
    (first,) = decoder.admit([0], [prompt])               # assign row 0 to what ``CausalLanguageModel.read`` returned
    logits_BV = decoder.step([first], positions=[0])      # the prompt's last token: logits of the text's first
    logits_BV = decoder.step([417], positions=[1])

The model's own code computes everything. It is given a cache whose layers write each row's key and value at that row's
position, the position itself, and a mask of what the row may read. A prompt of S tokens stands at the positions 0 to
S - 1, and the text behind it: position p of a text is S - 1 + p of its row.

Attended columns are rounded up to multiples of ``WIDTH_STEP``. On a CPU a row's logits then are the same, bit for bit,
whatever rows stand beside it: in float32, with layers whose widths are multiples of 32 (torch computes what is left
over of a tensor by other instructions), without experts, and where the attention is that of ``grouped_attention.py``.

Shape suffixes: B rows in use, H heads of keys and values, K head width, T positions, S positions of a prompt,
V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from mmcot.errors import InputError
from mmcot.models.device import to_device
from mmcot.models.grouped_attention import attending_in_groups, groups_of
from mmcot.models.packed_modules import packed

WIDTH_STEP = 16  # attended columns; torch's attention on CPUs rounds alike at all multiples of it
COLUMNS_STEP = 64  # columns are allocated in multiples of this


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """A prompt that was read: keys and values [H, S - 1, K] of each layer, and the last token, which was not read."""

    keys_values: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    last_token: int

    @property
    def num_read(self) -> int:
        """Tokens that were read, S - 1."""
        return self.keys_values[0][0].shape[1]


class CausalStepDecoder:
    """The model with the keys and values of ``num_rows`` rows.

    Args:
        model: with a causal head and plain keys and values in all layers, as ``CausalLanguageModel`` verifies; its
            weights are packed here where ``packed`` did not do it before.
        max_source_tokens: of a prompt; a longer one allocates more. On a CPU memory is taken for what occurs.
        max_new_tokens: tokens that a row can read from the prompt's last token on.
    """

    @torch.inference_mode()
    def __init__(self, model: PreTrainedModel, *, num_rows: int, max_source_tokens: int, max_new_tokens: int) -> None:
        self.num_rows, self.max_new_tokens = num_rows, max_new_tokens
        self._device, self._dtype = model.device, model.dtype
        self._model, self._whole_texts = packed(model), model  # the second reads many tokens a row
        self._has_groups = attending_in_groups(self._model)
        self._max_positions = max_positions(model.config)
        self._min_columns = 0 if self._device.type == "cpu" else max_source_tokens + max_new_tokens
        self._layers: list[RowsLayer] = []
        self._num_read = [0] * num_rows  # tokens of a row's prompt but the last
        self._num_written = [0] * num_rows  # columns of a row that may hold something; the others are 0

    @torch.inference_mode()
    def admit(self, rows: Sequence[int], states: Sequence[Prompt]) -> list[int]:
        """Assign each of ``rows`` to a prompt, whose keys and values are copied; one prompt may be given several times.

        What a row held before is cleared: it may be NaN, which a mask does not hide.

        Returns:
            the last token of each prompt, which its row reads at position 0.

        Raises:
            InputError: the prompt and ``max_new_tokens`` together are more than the positions that the model learned.
        """
        self._check_positions(states)
        if not self._layers:
            self._layers = [
                RowsLayer(self.num_rows, *like, is_transposed=self._has_groups) for like in states[0].keys_values
            ]
        self._reserve(max(prompt.num_read for prompt in states) + 1)
        for row, prompt in zip(rows, states, strict=True):
            self._clear(row, num_columns=prompt.num_read)
            self._num_read[row] = prompt.num_read
            for layer, (keys_HSK, values_HSK) in zip(self._layers, prompt.keys_values, strict=True):
                layer.write(row, keys_HSK, values_HSK)
        return [prompt.last_token for prompt in states]

    @torch.inference_mode()
    def move(self, row: int, *, to: int, num_positions: int) -> None:
        """Copy the prompt and the first ``num_positions`` tokens of ``row`` to the row ``to``."""
        num_columns = self._num_read[row] + num_positions
        self._clear(to, num_columns=num_columns)
        self._num_read[to] = self._num_read[row]
        for layer in self._layers:
            layer.write(to, *layer.read(row, num_columns))

    @torch.inference_mode()
    def step(self, token_ids: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """Read one more token in each of the first ``len(token_ids)`` rows.

        Args:
            token_ids: the token of each row.
            positions: the token's position, 0 for the prompt's last; the row has read all earlier ones.

        Returns:
            logits [B, V] of the next token.
        """
        columns = [self._num_read[row] + position for row, position in enumerate(positions)]
        for row, column in enumerate(columns):
            self._num_written[row] = max(self._num_written[row], column + 1)
        width = round_up(max(columns) + 1, WIDTH_STEP)
        self._reserve(width)
        ids_B, columns_B = to_device(np.array([token_ids, columns]), self._device)
        for layer in self._layers:
            layer.columns_B, layer.width = columns_B, width
        inputs: dict[str, Any] = {}
        if self._has_groups:
            inputs["row_groups"] = groups_of([round_up(column + 1, WIDTH_STEP) for column in columns])
        output = self._model(
            input_ids=ids_B[:, None],
            position_ids=columns_B[:, None],
            attention_mask=self._mask(columns_B, width),
            past_key_values=Cache(layers=cast(Any, self._layers)),
            use_cache=True,
            **inputs,
        )
        return output.logits[:, -1]

    @torch.inference_mode()
    def score(self, states: Sequence[Prompt], texts: Sequence[Sequence[int]]) -> list[list[float]]:
        """The log-probability of every token of texts, each after its prompt; texts of one prompt are read together."""
        found: list[list[float]] = [[]] * len(texts)
        numbers_of: dict[int, list[int]] = {}
        for number, prompt in enumerate(states):
            numbers_of.setdefault(id(prompt), []).append(number)
        for numbers in numbers_of.values():
            prompt, chosen = states[numbers[0]], [torch.tensor(texts[number]) for number in numbers]
            targets_BT = pad_sequence(chosen, batch_first=True).to(self._device)
            ids_BT = torch.cat([torch.full_like(targets_BT[:, :1], prompt.last_token), targets_BT[:, :-1]], dim=1)
            logits_BTV = self._whole_texts(
                input_ids=ids_BT,  # padding stands behind the tokens, where none reads it
                position_ids=torch.arange(ids_BT.shape[1], device=self._device)[None] + prompt.num_read,
                past_key_values=_cache_of(prompt, len(numbers)),
                use_cache=True,
            ).logits.float()
            log_probs_BT = logits_BTV.gather(2, targets_BT[..., None])[..., 0] - logits_BTV.logsumexp(dim=-1)
            for number, log_probs_T in zip(numbers, log_probs_BT.tolist(), strict=True):
                found[number] = log_probs_T[: len(texts[number])]
        return found

    def _mask(self, columns_B: torch.Tensor, width: int) -> torch.Tensor:
        """Additive mask [B, 1, 1, width]: -inf behind a row's own position."""
        is_later_BT = torch.arange(width, device=self._device) > columns_B[:, None]
        mask_BT = torch.zeros(is_later_BT.shape, dtype=self._dtype, device=self._device)
        return mask_BT.masked_fill_(is_later_BT, float("-inf"))[:, None, None]

    def _clear(self, row: int, *, num_columns: int) -> None:
        """Write zeros to what ``row`` holds beyond so many columns."""
        for layer in self._layers:
            layer.clear(row, num_columns, self._num_written[row])
        self._num_written[row] = num_columns

    def _reserve(self, num_columns: int) -> None:
        for layer in self._layers:
            layer.reserve(round_up(max(num_columns, self._min_columns), COLUMNS_STEP))

    def _check_positions(self, prompts: Sequence[Prompt]) -> None:
        longest = max(prompt.num_read for prompt in prompts) + 1
        if self._max_positions is not None and longest + self.max_new_tokens - 1 > self._max_positions:
            raise InputError(
                f"a prompt of {longest} tokens and a text of {self.max_new_tokens} (max_new_tokens) need "
                f"{longest + self.max_new_tokens - 1} positions, the model has {self._max_positions}; shorten the "
                "prompt or choose a smaller max_new_tokens"
            )


class RowsLayer(CacheLayerMixin):
    """One layer's keys and values of all rows, [rows, H, T, K]; a call writes one column of each of the first rows.

    The caller sets ``columns_B``, the column of each row in use, and ``width``, the columns that are read.

    Args:
        is_transposed: keep keys as [rows, H, K, T] in memory.
    """

    is_sliding = False

    def __init__(self, num_rows: int, keys_HSK: torch.Tensor, values_HSK: torch.Tensor, *, is_transposed: bool) -> None:
        super().__init__()
        self._is_transposed = is_transposed, False
        self._both = [both.new_zeros(num_rows, both.shape[0], 0, both.shape[2]) for both in (keys_HSK, values_HSK)]
        self.columns_B, self.width = torch.empty(0, dtype=torch.long), 0
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing is left to do."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the states [B, H, 1, K] of one token a row; returns what can be read, [B, H, width, K]."""
        num_rows = len(key_states)
        rows_B = torch.arange(num_rows, device=key_states.device)
        for cache_BHTK, states_BH1K in zip(self._both, (key_states, value_states), strict=True):
            cache_BHTK[rows_B, :, self.columns_B] = states_BH1K[:, :, 0]
        keys_BHTK, values_BHTK = (cache_BHTK[:num_rows, :, : self.width] for cache_BHTK in self._both)
        return keys_BHTK, values_BHTK

    def write(self, row: int, keys_HSK: torch.Tensor, values_HSK: torch.Tensor) -> None:
        """Write the first S columns of a row."""
        for cache_BHTK, states_HSK in zip(self._both, (keys_HSK, values_HSK), strict=True):
            cache_BHTK[row, :, : states_HSK.shape[1]] = states_HSK

    def read(self, row: int, num_columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first columns of a row, [H, num_columns, K] of keys and of values."""
        keys_HSK, values_HSK = (cache_BHTK[row, :, :num_columns] for cache_BHTK in self._both)
        return keys_HSK, values_HSK

    def clear(self, row: int, start: int, stop: int) -> None:
        """Write zeros to some columns of a row."""
        for cache_BHTK in self._both:
            cache_BHTK[row, :, start:stop] = 0

    def reserve(self, num_columns: int) -> None:
        """Have at least so many columns; what is written stays."""
        for place, before_BHTK in enumerate(self._both):
            num_rows, num_heads, before, width = before_BHTK.shape
            if before < num_columns:
                # Zeros, not uninitialised memory: masked columns are multiplied by 0, and 0 * NaN is NaN.
                if self._is_transposed[place]:
                    cache_BHTK = before_BHTK.new_zeros(num_rows, num_heads, width, num_columns).transpose(2, 3)
                else:
                    cache_BHTK = before_BHTK.new_zeros(num_rows, num_heads, num_columns, width)
                cache_BHTK[:, :, :before] = before_BHTK
                self._both[place] = cache_BHTK

    def get_seq_length(self) -> int:
        """Tokens before the one that is read, in the longest row."""
        return self.width - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that are read, and the first of them."""
        return self.width, 0

    def get_max_length(self) -> int:
        """-1: there is no maximum."""
        return -1


def _cache_of(prompt: Prompt, num_rows: int) -> DynamicCache:
    """The keys and values of a prompt for so many rows."""
    cache = DynamicCache()
    for number, both in enumerate(prompt.keys_values if prompt.num_read else ()):
        keys_BHSK, values_BHSK = (states_HSK.expand(num_rows, *states_HSK.shape) for states_HSK in both)
        cache.update(keys_BHSK, values_BHSK, number)
    return cache


def max_positions(config: Any) -> int | None:
    """Positions that the model has; None where they are computed, by rotation, for any number."""
    return None if getattr(config, "rope_parameters", None) else getattr(config, "max_position_embeddings", None)


def round_up(number: int, step: int) -> int:
    """The first multiple of ``step`` that is not below ``number``."""
    return -(-number // step) * step
