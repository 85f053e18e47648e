"""Generating texts for a set of questions with one model.

    texts = generate_texts(model, tokenizer, sources, features, feature_shape=(100, 256),
                           max_new_tokens=256, batch_size=32)
    texts[0]   # GeneratedText(text="Solution: ...", num_tokens=57, finish="eos")

A fixed number of rows is decoded together (``mmcot/decoding/rows.py``). A question's text depends on the model, on its
own source and, with sampling, on the seed and its key. It does not depend on the other rows, except for rounding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from mmcot.decoding.engine import Engine
from mmcot.decoding.rows import generate_ids as generate_ids
from mmcot.decoding.rows import generate_rows as generate_rows
from mmcot.decoding.sampling import Sampling
from mmcot.decoding.source_batches import SourceBatch, collate_sources
from mmcot.models.contract import Model

BYTES_PER_CHARACTER = 4  # at most, in UTF-8


@dataclasses.dataclass(frozen=True, slots=True)
class GeneratedText:
    """A generated text.

    ``finish`` is "eos", "length" where the limit truncated it, or "stop" where a stop string
    ended it (the text ends before that string; ``num_tokens`` counts all tokens, those of a prefix too).
    ``log_probs`` has the log-probability of each of these tokens where it was asked for.
    """

    text: str
    num_tokens: int
    finish: str
    log_probs: tuple[float, ...] = ()


def generate_texts(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[Sequence[int]],
    features: Sequence[np.ndarray | None],
    *,
    feature_shape: tuple[int, int],
    max_new_tokens: int,
    batch_size: int,
    num_beams: int = 1,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    keys: Sequence[str] | None = None,
    stop: Sequence[str] = (),
    prefixes: Sequence[Sequence[int]] | None = None,
    with_log_probs: bool = False,
    engine: Engine | None = None,
    batches: Iterable[SourceBatch] | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> list[GeneratedText]:
    """Generate one text for each source: greedily, by sampling or by beam search.

    Args:
        sources: token ids of each source.
        features: an array [p, V] for each source, or all None.
        feature_shape: [P, V] with p <= P.
        batch_size: rows that are decoded together.
        num_beams: above 1, beam search by transformers, without sampling, stop strings, prefixes and log-probabilities.
        temperature: 0 is greedy; above, tokens are drawn from softmax(logits / temperature).
        top_p: draw from the smallest set of most probable tokens with this much probability.
        seed: seed of sampling, together with ``keys``.
        keys: a name for each source (its qid), needed for sampling.
        stop: a text ends before the first of these strings that it would contain after its prefix.
        prefixes: token ids that each source's text has to begin with; they count as new tokens.
        with_log_probs: also return the log-probability of every token.
        engine: of this model, opened for these sizes or larger ones; None opens one for this call.
        batches: ``batch_sources`` of these sources, where they were made ahead; ``features`` are not read then. Beam
            search uses neither.
        on_step: called whenever new tokens of all rows are known, or after every batch of a beam search.

    Returns:
        texts in the order of ``sources``.

    Raises:
        ValueError: arguments contradict each other.
    """
    sampling = Sampling(temperature, top_p, seed)
    _check_arguments(sources, features, num_beams, sampling, keys, stop)
    if num_beams > 1:
        if prefixes is not None or with_log_probs:
            raise ValueError(f"num_beams ({num_beams}) above 1 goes with neither prefixes nor log-probabilities")
        return _beam_search(
            model, tokenizer, sources, features, feature_shape, max_new_tokens, batch_size, num_beams, on_step
        )

    tail = BYTES_PER_CHARACTER * max(map(len, stop), default=0) + 8  # a token is a byte at least

    def is_stopped(ids: list[int]) -> bool:
        text = _decode(tokenizer, ids[-tail:])
        return any(string in text for string in stop)

    ends = _end_tokens(model, tokenizer)
    rows = generate_rows(
        model,
        sources,
        features,
        feature_shape=feature_shape,
        max_new_tokens=max_new_tokens,
        num_rows=batch_size,
        eos_token_ids=ends,
        sampling=sampling,
        keys=keys,
        is_stopped=is_stopped if stop else None,
        prefixes=prefixes,
        with_log_probs=with_log_probs,
        engine=engine,
        batches=batches,
        on_step=on_step,
    )
    return [_read_row(tokenizer, row.ids, ends, stop, prefix=row.prefix, log_probs=row.log_probs) for row in rows]


def _beam_search(
    model, tokenizer, sources, features, feature_shape, max_new_tokens, batch_size, num_beams, on_step
) -> list[GeneratedText]:
    texts: dict[int, GeneratedText] = {}  # by the source's index
    by_length = sorted(range(len(sources)), key=lambda index: (-len(sources[index]), index))
    for start in range(0, len(by_length), batch_size):
        chosen = by_length[start : start + batch_size]
        inputs = collate_sources(
            [sources[i] for i in chosen],
            [features[i] for i in chosen],
            feature_shape=feature_shape,
            pad_token_id=tokenizer.pad_token_id,
            dtype=model.dtype,
        )
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        with torch.inference_mode():
            outputs = model.generate(
                **inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=num_beams, use_cache=True
            )
        for index, row in zip(chosen, outputs[:, 1:].tolist(), strict=True):
            texts[index] = _read_row(tokenizer, row, _end_tokens(model, tokenizer), ())
        on_step()
    return [texts[index] for index in range(len(sources))]


def _end_tokens(model: Model, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    configured = cast(Any, model.generation_config).eos_token_id
    configured = configured if isinstance(configured, (list, tuple)) else [configured]
    tokens = (cast("int | None", tokenizer.eos_token_id), *configured)
    return frozenset(token for token in tokens if token is not None)


def _read_row(
    tokenizer: PreTrainedTokenizerBase,
    row: list[int],
    ends: frozenset[int],
    stop: Sequence[str],
    *,
    prefix: Sequence[int] = (),
    log_probs: Sequence[float] = (),
) -> GeneratedText:
    length = next((place for place in range(len(prefix), len(row)) if row[place] in ends), None)
    ended, ids = length is not None, row[:length]
    text = _decode(tokenizer, ids)
    start = len(_decode(tokenizer, prefix)) if stop and prefix else 0
    found = [place for string in stop if (place := text.find(string, start)) >= 0]
    finish = "stop" if found else "eos" if ended else "length"
    num_tokens = len(ids) + ended
    return GeneratedText(text[: min(found, default=len(text))], num_tokens, finish, tuple(log_probs[:num_tokens]))


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return cast(str, tokenizer.decode(list(ids), skip_special_tokens=True))  # a list only for a batch


def _check_arguments(sources, features, num_beams, sampling, keys, stop) -> None:
    if len(features) != len(sources):
        raise ValueError(
            f"features has {len(features)} entries for {len(sources)} sources; give one each, or None each"
        )
    if keys is not None and len(keys) != len(sources):
        raise ValueError(f"keys has {len(keys)} entries for {len(sources)} sources; give one each")
    if sampling.temperature > 0 and keys is None:
        raise ValueError(f"sampling (temperature {sampling.temperature}) needs keys; give each question's qid")
    if num_beams > 1 and (sampling.temperature > 0 or stop):
        raise ValueError(f"num_beams ({num_beams}) above 1 goes with neither temperature nor stop; use num_beams=1")
    if isinstance(stop, str) or "" in stop:
        raise ValueError(f"stop ({stop!r}) must be a list of strings that are not empty")
