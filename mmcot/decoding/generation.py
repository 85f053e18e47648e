"""Generating texts for a set of questions with one model.

    texts = generate_texts(model, tokenizer, sources, features, feature_shape=(100, 256),
                           max_new_tokens=256, batch_size=32)
    texts[0]   # GeneratedText(text="Solution: ...", num_tokens=57, finish="eos")

A fixed number of rows is decoded together (continuous batching): when a row ends, the next
waiting source takes its place at once. A question's text depends on the model, on its own source
and, with sampling, on the seed and its key. It does not depend on the other rows, except for
rounding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from mmcot.decoding.sampling import GREEDY, Sampling, draw_uniform, sample_tokens
from mmcot.models.contract import Model
from mmcot.texts.encoding import stack_features

SOURCES_PER_ENCODING = 16  # encoded together before they wait for a row
BYTES_PER_CHARACTER = 4  # at most, in UTF-8

# Settings of a model folder's generation_config.json that would change the chosen tokens, each
# with the value that changes nothing.
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


@dataclasses.dataclass(slots=True)
class Row:
    """The row of a source: its index, its limit, the token before its generated ones, its prefix, and these.

    ``log_probs`` are the natural logarithms of the tokens' probabilities, without temperature, where they were asked
    for; else it is empty.
    """

    index: int
    max_new_tokens: int
    first: int
    prefix: Sequence[int] = ()
    ids: list[int] = dataclasses.field(default_factory=list)
    log_probs: list[float] = dataclasses.field(default_factory=list)


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
        on_step: called after every step of all rows, or after every batch of a beam search.

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
        on_step=on_step,
    )
    return [_read_row(tokenizer, row.ids, ends, stop, prefix=row.prefix, log_probs=row.log_probs) for row in rows]


def generate_ids(
    model: Model, sources: Sequence[Sequence[int]], features: Sequence[np.ndarray | None], **options: Any
) -> list[list[int]]:
    """Generate token ids for each source; arguments as for ``generate_rows``.

    Returns:
        ids of each source, in their order, with its prefix, and with the end token where one was generated.
    """
    return [row.ids for row in generate_rows(model, sources, features, **options)]


@torch.inference_mode()
def generate_rows(
    model: Model,
    sources: Sequence[Sequence[int]],
    features: Sequence[np.ndarray | None],
    *,
    feature_shape: tuple[int, int],
    max_new_tokens: int | Sequence[int],
    num_rows: int,
    eos_token_ids: Iterable[int],
    sampling: Sampling = GREEDY,
    keys: Sequence[str] | None = None,
    prefixes: Sequence[Sequence[int]] | None = None,
    with_log_probs: bool = False,
    is_stopped: Callable[[list[int]], bool] | None = None,
    on_refill: Callable[[int], None] | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> list[Row]:
    """Generate token ids for each source, ``num_rows`` of them at a time.

    Args:
        max_new_tokens: one limit for all, or one for each source.
        eos_token_ids: a row ends with any of these.
        prefixes: ids that each source's row has to begin with; they count as new tokens.
        with_log_probs: also return the log-probability of every token.
        is_stopped: called after every token with a row's ids after its prefix; returns whether they end the row.
        on_refill: called with the index of every source that takes a finished row's place.
        on_step: called for every row that starts, and after every step of all rows.

    Returns:
        a row for each source, in their order.

    Raises:
        ValueError: arguments contradict each other.
    """
    if not sources:
        return []
    _check_generation_config(model)
    limits = [max_new_tokens] * len(sources) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    prefixes = [()] * len(sources) if prefixes is None else prefixes
    _check_prefixes(prefixes, limits)
    if min(limits) < 1 or num_rows < 1:
        raise ValueError(f"max_new_tokens ({min(limits)}) and the number of rows ({num_rows}) must be at least 1")
    num_rows = min(num_rows, len(sources))
    decoder = model.open_decoder(
        num_rows=num_rows, max_source_tokens=max(map(len, sources)), max_new_tokens=max(limits)
    )
    choose = _greedy if sampling.temperature == 0 else _sampler(sampling, keys)
    ends = frozenset(eos_token_ids)

    def has_ended(row: Row) -> bool:
        if row.prefix and len(row.ids) <= len(row.prefix):
            return False
        if row.ids[-1] in ends or len(row.ids) >= row.max_new_tokens:
            return True
        return is_stopped is not None and is_stopped(row.ids[len(row.prefix) :])

    waiting = _encode_sources(model, sources, features, feature_shape)
    written: dict[int, Row] = {}  # by the source's index
    rows: list[Row] = []
    while len(rows) < num_rows:
        index, states = next(waiting)
        rows.append(Row(index, limits[index], decoder.admit(len(rows), states), prefixes[index]))
        on_step()
    while rows:
        logits = decoder.step([row.ids[-1] if row.ids else row.first for row in rows], [len(row.ids) for row in rows])
        for row, token in zip(rows, choose(logits, rows), strict=True):
            row.ids.append(row.prefix[len(row.ids)] if len(row.ids) < len(row.prefix) else token)
        if with_log_probs:
            last_B1 = torch.tensor([[row.ids[-1]] for row in rows], device=logits.device)
            for row, value in zip(
                rows, logits.float().log_softmax(dim=-1).gather(1, last_B1)[:, 0].tolist(), strict=True
            ):
                row.log_probs.append(value)
        on_step()
        for place in reversed(range(len(rows))):  # backwards, so that the last row is always one that continues
            row = rows[place]
            if not has_ended(row):
                continue
            written[row.index] = row
            if (source := next(waiting, None)) is not None:
                rows[place] = Row(source[0], limits[source[0]], decoder.admit(place, source[1]), prefixes[source[0]])
                if on_refill:
                    on_refill(source[0])
            elif (last := rows.pop()) is not row:
                rows[place] = last
                decoder.move(len(rows), to=place, num_positions=len(last.ids))
    return [written[index] for index in range(len(sources))]


def _greedy(logits_BV: torch.Tensor, rows: Sequence[Row]) -> list[int]:
    return logits_BV.argmax(dim=-1).tolist()


def _sampler(sampling: Sampling, keys: Sequence[str] | None) -> Callable[[torch.Tensor, Sequence[Row]], list[int]]:
    if keys is None:
        raise ValueError(f"sampling (temperature {sampling.temperature}) needs keys; give each question's qid")

    def choose(logits_BV: torch.Tensor, rows: Sequence[Row]) -> list[int]:
        uniform_B = [draw_uniform(sampling.seed, keys[row.index], len(row.ids)) for row in rows]
        return sample_tokens(logits_BV, uniform_B, temperature=sampling.temperature, top_p=sampling.top_p)

    return choose


def _encode_sources(model, sources, features, feature_shape) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (index, states [N, D]), the longest sources first, so that a batch has similar lengths."""
    by_length = sorted(range(len(sources)), key=lambda index: (-len(sources[index]), index))
    for start in range(0, len(by_length), SOURCES_PER_ENCODING):
        chosen = by_length[start : start + SOURCES_PER_ENCODING]
        pad_token_id = model.config.pad_token_id
        inputs = _collate_sources(
            model, pad_token_id, [sources[i] for i in chosen], [features[i] for i in chosen], feature_shape
        )
        yield from zip(chosen, model.read(**inputs), strict=True)


def _beam_search(
    model, tokenizer, sources, features, feature_shape, max_new_tokens, batch_size, num_beams, on_step
) -> list[GeneratedText]:
    texts: dict[int, GeneratedText] = {}  # by the source's index
    by_length = sorted(range(len(sources)), key=lambda index: (-len(sources[index]), index))
    for start in range(0, len(by_length), batch_size):
        chosen = by_length[start : start + batch_size]
        inputs = _collate_sources(
            model, tokenizer.pad_token_id, [sources[i] for i in chosen], [features[i] for i in chosen], feature_shape
        )
        with torch.inference_mode():
            outputs = model.generate(
                **inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=num_beams, use_cache=True
            )
        for index, row in zip(chosen, outputs[:, 1:].tolist(), strict=True):
            texts[index] = _read_row(tokenizer, row, _end_tokens(model, tokenizer), ())
        on_step()
    return [texts[index] for index in range(len(sources))]


def _collate_sources(model, pad_token_id, sources, features, feature_shape) -> dict[str, torch.Tensor]:
    width = max(len(source) for source in sources)
    ids = torch.full((len(sources), width), pad_token_id)
    for row, source in zip(ids, sources, strict=True):
        row[: len(source)] = torch.tensor(source)
    lengths = torch.tensor([len(source) for source in sources])
    inputs = {"input_ids": ids, "attention_mask": (torch.arange(width) < lengths[:, None]).long()}
    if features[0] is not None:
        inputs |= stack_features(features, feature_shape)
        inputs["vision_features"] = inputs["vision_features"].to(model.dtype)
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}


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


def _check_prefixes(prefixes: Sequence[Sequence[int]], limits: Sequence[int]) -> None:
    if len(prefixes) != len(limits):
        raise ValueError(f"prefixes has {len(prefixes)} entries for {len(limits)} sources; give one each, such as ()")
    for index, (prefix, limit) in enumerate(zip(prefixes, limits, strict=True)):
        if len(prefix) >= limit:
            raise ValueError(
                f"the prefix of source {index} has {len(prefix)} tokens, max_new_tokens is {limit}; a prefix counts as "
                "new tokens, so the limit must be larger"
            )


def _check_generation_config(model: Model) -> None:
    """Raise ValueError if the model's folder sets what this module does not support."""
    for name, neutral in UNSUPPORTED_SETTINGS.items():
        value = getattr(model.generation_config, name, None)
        if value not in (None, neutral):
            raise ValueError(
                f"the model's generation_config sets {name} to {value!r}, which is not supported; "
                f"set model.generation_config.{name} = {neutral!r}"
            )
