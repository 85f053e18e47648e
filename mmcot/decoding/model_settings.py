"""What a model's ``generation_config`` and tokenizer say about its texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from mmcot.errors import InputError
from mmcot.models.contract import GenerativeModel

# Settings of a model folder's generation_config.json that would change the chosen tokens, each
# with the value that changes nothing. What is chosen is decided by a request alone.
UNSUPPORTED_SETTINGS = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "sequence_bias": None,
    "guidance_scale": 1.0,
}


def check_generation_config(model: GenerativeModel) -> None:
    """Raise InputError if the model's folder sets what this package does not read from there."""
    for name, neutral in UNSUPPORTED_SETTINGS.items():
        value = getattr(model.generation_config, name, None)
        if value not in (None, neutral):
            raise InputError(
                f"the model's generation_config sets {name} to {value!r}, which is not supported; "
                f"set model.generation_config.{name} = {neutral!r}"
            )


def ids_before_text(model: GenerativeModel, source: Sequence[int]) -> tuple[int, ...]:
    """The source where the model reads it in the same way as its text, as a causal model does; else nothing."""
    return () if getattr(model.config, "is_encoder_decoder", False) else tuple(source)


def end_tokens(model: GenerativeModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end a text, of the model and of the tokenizer."""
    configured = cast(Any, model.generation_config).eos_token_id
    configured = configured if isinstance(configured, (list, tuple)) else [configured]
    tokens = (cast("int | None", tokenizer.eos_token_id), *configured)
    return frozenset(token for token in tokens if token is not None)
