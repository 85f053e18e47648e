"""Any causal language model of transformers as a model that writes texts with the engine.

    model = CausalLanguageModel(AutoModelForCausalLM.from_pretrained(folder))
    engine = open_engine(model, tokenizer, ..., num_rows=64)     # mmcot/decoding/engine.py
    engine.write([Request(Source(prompt_ids))])

Sources are prompts. The model is run by its own code (``mmcot/models/causal_decoder.py``). On a CPU its linear
layers are packed once, so that its weights, dtype and device must not change afterwards.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, cast

import torch
from torch.nn import functional as F  # noqa: N812 (the usual name)
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from mmcot.errors import InputError
from mmcot.models.causal_decoder import WIDTH_STEP, CausalStepDecoder, Prompt, max_positions, round_up
from mmcot.models.packed_modules import packed

# On a CPU; about as many as one row of 512: the states of more do not stay in a processor's cache.
TOKENS_PER_CALL = 512
NEEDED_ARGUMENTS = ("input_ids", "attention_mask", "position_ids", "past_key_values")


class CausalLanguageModel:
    """A model with a causal head, for text alone.

    Args:
        model: on its device and in its type; it is put into evaluation mode and stays otherwise as it is.

    Raises:
        InputError: the model keeps something else than the keys and values of all tokens, or its rows cannot stand at
            positions of their own.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval()
        check_causal(model)
        self.config = model.config
        self.generation_config = model.generation_config

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return self.model.dtype

    @cached_property
    def _packed(self) -> Any:
        return packed(self.model)

    @torch.inference_mode()
    def read(self, **inputs: torch.Tensor) -> list[Prompt]:
        """Compute the keys and values of prompts; those of padding are left out.

        On a CPU a call has prompts of similar lengths alone, padded to a width that depends on their own lengths, so
        that what is read of a prompt does not depend on the others.

        Args:
            inputs: ``input_ids`` and ``attention_mask``, int64 [B, S], padded on the right.

        Raises:
            InputError: something else is given, or a prompt has no tokens, or more than the model has positions.
        """
        if other := sorted(inputs.keys() - {"input_ids", "attention_mask"}):
            raise InputError(f"{type(self.model).__name__} reads text alone, without {', '.join(other)}")
        input_ids, lengths = inputs["input_ids"], inputs["attention_mask"].sum(dim=1).tolist()
        self._check_lengths(lengths)
        prompts: dict[int, Prompt] = {}
        for rows, width in self._calls(lengths):
            ids_BS = F.pad(input_ids[rows], (0, max(0, width - input_ids.shape[1])))[:, :width].to(self.device)
            for row, prompt in zip(rows, self._read(ids_BS, [lengths[row] for row in rows]), strict=True):
                prompts[row] = prompt
        return [prompts[row] for row in range(len(lengths))]

    def _calls(self, lengths: Sequence[int]) -> list[tuple[list[int], int]]:
        """The rows of each call of the model and the width to which they are padded."""
        if self.device.type != "cpu":
            return [(list(range(len(lengths))), max(lengths))]
        most = max_positions(self.config) or max(lengths) + WIDTH_STEP
        rows_of_width: dict[int, list[int]] = {}
        for row, length in enumerate(lengths):
            rows_of_width.setdefault(min(round_up(length, WIDTH_STEP), most), []).append(row)
        calls = []
        for width, rows in rows_of_width.items():
            size = max(1, TOKENS_PER_CALL // width)
            calls += [(rows[start : start + size], width) for start in range(0, len(rows), size)]
        return calls

    def _read(self, ids_BS: torch.Tensor, lengths: Sequence[int]) -> Iterator[Prompt]:
        # Padding stands behind the tokens, where no token reads it: it needs no mask.
        cache = DynamicCache(config=self.config)
        self._packed.base_model(input_ids=ids_BS, past_key_values=cache, use_cache=True)
        last_tokens = ids_BS[torch.arange(len(lengths)), torch.tensor(lengths) - 1].tolist()
        both = [(cast(Any, layer).keys, cast(Any, layer).values) for layer in cache.layers]
        for row, (length, last_token) in enumerate(zip(lengths, last_tokens, strict=True)):
            keys_values = tuple(
                (keys_BHSK[row, :, : length - 1].clone(), values_BHSK[row, :, : length - 1].clone())
                for keys_BHSK, values_BHSK in both
            )
            yield Prompt(keys_values, last_token)

    def _check_lengths(self, lengths: Sequence[int]) -> None:
        if min(lengths) == 0:
            raise InputError("a prompt has no tokens, expected one at least; begin it with a token such as bos_token")
        if (most := max_positions(self.config)) is not None and max(lengths) > most:
            raise InputError(f"a prompt has {max(lengths)} tokens, the model has {most} positions; shorten it")

    def open_reader(self) -> Callable[..., list[Prompt]]:
        """``read``, whose weights are packed at its first call; they must not change afterwards."""
        return self.read

    def open_decoder(self, *, num_rows: int, max_source_tokens: int, max_new_tokens: int) -> CausalStepDecoder:
        """A decoder of ``num_rows`` rows for prompts of at most ``max_source_tokens`` tokens."""
        return CausalStepDecoder(
            self._packed, num_rows=num_rows, max_source_tokens=max_source_tokens, max_new_tokens=max_new_tokens
        )

    @torch.inference_mode()
    def generate(self, *, input_ids: torch.Tensor, attention_mask: torch.Tensor, **options: Any) -> torch.Tensor:
        """Generate by the model's own ``generate``, for beam search; prompts are padded on the right, as for ``read``.

        Returns:
            ids [rows, 1 + new]: the prompt's last token, then the new ones.
        """
        width = input_ids.shape[1]
        num_padding_B1 = width - attention_mask.sum(dim=1, keepdim=True)
        # A causal model's generate continues prompts that are padded on the left.
        shifted_BS = (torch.arange(width, device=input_ids.device) - num_padding_B1) % width
        outputs = cast(Any, self.model).generate(
            input_ids=input_ids.gather(1, shifted_BS), attention_mask=attention_mask.gather(1, shifted_BS), **options
        )
        return outputs[:, width - 1 :]


def check_causal(model: PreTrainedModel) -> None:
    """Raise InputError where a model cannot be decoded with rows at positions of their own."""
    name, config = type(model).__name__, model.config
    if config.is_encoder_decoder or not model.can_generate() or getattr(config, "is_decoder", True) is False:
        raise _refusal(name, "is no decoder-only language model (is_encoder_decoder, can_generate, is_decoder)")
    if cast(Any, model)._is_stateful:
        raise _refusal(name, "keeps a state instead of keys and values")
    taken = inspect.signature(model.forward).parameters
    if missing := [argument for argument in NEEDED_ARGUMENTS if argument not in taken]:
        raise _refusal(name, f"has a forward that does not take {', '.join(missing)}")
    layers = {type(layer) for layer in DynamicCache(config=config).layers}
    if other := sorted(layer.__name__ for layer in layers if layer is not DynamicLayer):
        raise _refusal(name, f"has layers whose cache is {', '.join(other)}, not DynamicLayer")
    if "local" in getattr(config, "attention_layers", ()) or getattr(config, "alibi", False):
        raise _refusal(name, "counts distances by the columns of the cache (local attention or ALiBi)")
    if not _counts_from_zero(model):
        raise _refusal(name, "gives a text other positions than 0, 1, 2, ...")


def _refusal(name: str, reason: str) -> InputError:
    return InputError(
        f"{name} {reason}; expected a causal language model that keeps the keys and values of all tokens and takes "
        "their positions, such as LlamaForCausalLM"
    )


@torch.inference_mode()
def _counts_from_zero(model: PreTrainedModel) -> bool:
    """Whether positions 0 and 1 given to the model are those that it gives two tokens itself, by equal logits."""
    ids_BS = torch.tensor([[1, 2]], device=model.device)
    position_ids_BS = torch.tensor([[0, 1]], device=model.device)
    return torch.equal(model(input_ids=ids_BS).logits, model(input_ids=ids_BS, position_ids=position_ids_BS).logits)
