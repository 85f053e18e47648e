"""Generating token ids with one model, a fixed number of rows at a time.

    rows = generate_rows(model, sources, features, feature_shape=(100, 256), max_new_tokens=256, num_rows=32,
                         eos_token_ids=[1])
    rows[0].ids      # [417, 9, ..., 1]

When a row ends, the next waiting source takes its place at once (continuous batching). A decoder that chooses tokens
itself (``GreedyDecoder``, on a GPU) is looked at every few tokens: a row that has ended by then is replaced at that
time, and what it wrote after its end is dropped.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import torch

from mmcot.decoding.engine import Engine, open_engine
from mmcot.decoding.sampling import GREEDY, Sampling, draw_uniform, sample_tokens
from mmcot.decoding.source_batches import SourceBatch, batch_sources
from mmcot.errors import InputError
from mmcot.models.contract import Decoder, GreedyDecoder, Model

SOURCES_AT_ONCE = 32  # at most, whose keys and values are computed together
TOKENS_PER_LOOK = 8  # of every row, between two looks at a decoder that chooses tokens itself

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
    has_ended: bool = False


Advance = Callable[[Sequence[Row]], Callable[[], list[list[int]]]]  # begins to write; what it returns waits for it


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
    engine: Engine | None = None,
    batches: Iterable[SourceBatch] | None = None,
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
        engine: of this model, opened for these sizes or larger ones; None opens one for this call.
        batches: ``batch_sources`` of these sources, where they were made ahead; ``features`` are not read then.
        on_refill: called with the index of every source that takes a finished row's place.
        on_step: called whenever some rows start, and whenever new tokens of all rows are known.

    Returns:
        a row for each source, in their order.

    Raises:
        ValueError: arguments contradict each other.
    """
    if not sources:
        return []
    _check_generation_config(model)
    limits = [max_new_tokens] * len(sources) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    prefixes = cast("Sequence[Sequence[int]]", [()] * len(sources)) if prefixes is None else prefixes
    _check_prefixes(prefixes, limits)
    if min(limits) < 1 or num_rows < 1:
        raise InputError(f"max_new_tokens ({min(limits)}) and the number of rows ({num_rows}) must be at least 1")
    num_rows = min(num_rows, len(sources))
    if engine is None:
        engine = open_engine(
            model, num_rows=num_rows, max_source_tokens=max(map(len, sources)), max_new_tokens=max(limits)
        )
    engine.check_sizes(num_rows=num_rows, max_new_tokens=max(limits))
    if batches is None:
        batches = batch_sources(
            sources,
            features,
            feature_shape=feature_shape,
            pad_token_id=model.config.pad_token_id,
            dtype=model.dtype,
            for_gpu=model.device.type == "cuda",
        )
    decoder = engine.decoder

    def begin(places: Sequence[int], given: Sequence[tuple[int, torch.Tensor]]) -> list[Row]:
        first = decoder.admit(places, [states_SD for _, states_SD in given])
        return [Row(index, limits[index], first, prefixes[index]) for index, _ in given]

    advance = _on_host(decoder, sampling, keys, with_log_probs)
    if isinstance(decoder, GreedyDecoder) and sampling.temperature == 0 and not with_log_probs and not any(prefixes):
        advance = partial(_write_on_device, decoder)
    ends = frozenset(eos_token_ids)
    written = _write_rows(
        decoder,
        _EncodedSources(engine, batches),
        begin,
        advance,
        num_rows=num_rows,
        ends_row=lambda row: _ends_row(row, ends, is_stopped),
        on_refill=on_refill or (lambda index: None),
        on_step=on_step,
    )
    return [written[index] for index in range(len(sources))]


def _write_rows(
    decoder: Decoder,
    waiting: _EncodedSources,
    begin: Callable[[Sequence[int], Sequence[tuple[int, torch.Tensor]]], list[Row]],
    advance: Advance,
    *,
    num_rows: int,
    ends_row: Callable[[Row], bool],
    on_refill: Callable[[int], None],
    on_step: Callable[[], None],
) -> dict[int, Row]:
    """Write the rows of all waiting sources; returns them by the sources' indices.

    Args:
        begin: assigns places to sources.
        advance: begins to write the next tokens of the rows; returns the function that waits for them.
        ends_row: whether a row ends with its last token.
    """
    written: dict[int, Row] = {}
    rows: list[Row] = []
    while len(rows) < num_rows:
        stop = min(num_rows, len(rows) + SOURCES_AT_ONCE)
        places = range(len(rows), stop)
        rows += begin(places, waiting.take(len(places)))
        on_step()
    while rows:
        tokens_of_rows = advance(rows)
        waiting.encode_ahead(len(rows) // 4)  # while a GPU writes
        for row, tokens in zip(rows, tokens_of_rows(), strict=True):
            for token in tokens:
                row.ids.append(token)
                if ends_row(row):
                    row.has_ended = True
                    break  # what was written after the end is dropped
        on_step()
        ended = [place for place, row in enumerate(rows) if row.has_ended]
        written |= {rows[place].index: rows[place] for place in ended}
        while ended and (given := waiting.take(min(len(ended), SOURCES_AT_ONCE))):
            places, ended = ended[: len(given)], ended[len(given) :]
            for place, row in zip(places, begin(places, given), strict=True):
                rows[place] = row
                on_refill(row.index)
        for place in reversed(ended):  # backwards, so that the last row is always one that continues
            last = rows.pop()
            if place < len(rows):
                rows[place] = last
                decoder.move(len(rows), to=place, num_positions=len(last.ids))
    return written


def _ends_row(row: Row, ends: frozenset[int], is_stopped: Callable[[list[int]], bool] | None) -> bool:
    """Whether a row ends with its last token."""
    if row.prefix and len(row.ids) <= len(row.prefix):
        return False
    if row.ids[-1] in ends or len(row.ids) >= row.max_new_tokens:
        return True
    return is_stopped is not None and is_stopped(row.ids[len(row.prefix) :])


def _write_on_device(decoder: GreedyDecoder, rows: Sequence[Row]) -> Callable[[], list[list[int]]]:
    """Begin the next tokens of each row, at most ``TOKENS_PER_LOOK``, chosen by the decoder."""
    num_tokens = min(TOKENS_PER_LOOK, max(row.max_new_tokens - len(row.ids) for row in rows))
    longest = max(len(row.ids) for row in rows)
    return decoder.write_greedily(num_tokens, num_rows=len(rows), num_positions=longest + num_tokens)


def _on_host(decoder: Decoder, sampling: Sampling, keys: Sequence[str] | None, with_log_probs: bool) -> Advance:
    """The function that chooses one token of each row from the logits, or takes it from the row's prefix."""
    choose = _greedy if sampling.temperature == 0 else _sampler(sampling, keys)

    def advance(rows: Sequence[Row]) -> Callable[[], list[list[int]]]:
        last = [row.ids[-1] if row.ids else row.first for row in rows]
        logits_BV = decoder.step(last, [len(row.ids) for row in rows])
        tokens = [
            row.prefix[len(row.ids)] if len(row.ids) < len(row.prefix) else token
            for row, token in zip(rows, choose(logits_BV, rows), strict=True)
        ]
        if with_log_probs:
            tokens_B1 = torch.tensor(tokens, device=logits_BV.device)[:, None]
            log_probs_B = logits_BV.float().log_softmax(dim=-1).gather(1, tokens_B1)[:, 0].tolist()
            for row, log_prob in zip(rows, log_probs_B, strict=True):
                row.log_probs.append(log_prob)
        return lambda: [[token] for token in tokens]

    return advance


def _greedy(logits_BV: torch.Tensor, rows: Sequence[Row]) -> list[int]:
    return logits_BV.argmax(dim=-1).tolist()


def _sampler(sampling: Sampling, keys: Sequence[str] | None) -> Callable[[torch.Tensor, Sequence[Row]], list[int]]:
    if keys is None:
        raise InputError(f"sampling (temperature {sampling.temperature}) needs keys; give each question's qid")

    def choose(logits_BV: torch.Tensor, rows: Sequence[Row]) -> list[int]:
        uniform_B = [draw_uniform(sampling.seed, keys[row.index], len(row.ids)) for row in rows]
        return sample_tokens(logits_BV, uniform_B, temperature=sampling.temperature, top_p=sampling.top_p)

    return choose


class _EncodedSources:
    """The sources in the order of their batches, as (index, states [N, D])."""

    def __init__(self, engine: Engine, batches: Iterable[SourceBatch]) -> None:
        self._engine, self._batches = engine, iter(batches)
        self._ready: deque[tuple[int, torch.Tensor]] = deque()

    def encode_ahead(self, number: int) -> None:
        """Encode batches until so many sources are ready, or all."""
        while len(self._ready) < number and (batch := next(self._batches, None)) is not None:
            self._ready.extend(zip(batch.indices, _read(self._engine, batch.inputs), strict=True))

    def take(self, number: int) -> list[tuple[int, torch.Tensor]]:
        """The next sources, fewer where there are no more."""
        self.encode_ahead(number)
        return [self._ready.popleft() for _ in range(min(number, len(self._ready)))]


def _read(engine: Engine, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Encode a batch; in halves where it does not fit the memory, which depends on the model and on other processes."""
    num_sources = len(inputs["input_ids"])
    try:
        return engine.read(**inputs)
    except torch.OutOfMemoryError:
        if num_sources == 1:
            raise
    # Not within the handler, where the error keeps what was computed.
    halves = slice(num_sources // 2), slice(num_sources // 2, None)
    return [states_ND for half in halves for states_ND in _read(engine, {name: inputs[name][half] for name in inputs})]


def _check_prefixes(prefixes: Sequence[Sequence[int]], limits: Sequence[int]) -> None:
    if len(prefixes) != len(limits):
        raise InputError(f"prefixes has {len(prefixes)} entries for {len(limits)} sources; give one each, such as ()")
    for index, (prefix, limit) in enumerate(zip(prefixes, limits, strict=True)):
        if len(prefix) >= limit:
            raise InputError(
                f"the prefix of source {index} has {len(prefix)} tokens, max_new_tokens is {limit}; a prefix counts as "
                "new tokens, so the limit must be larger"
            )


def _check_generation_config(model: Model) -> None:
    """Raise ValueError if the model's folder sets what this module does not support."""
    for name, neutral in UNSUPPORTED_SETTINGS.items():
        value = getattr(model.generation_config, name, None)
        if value not in (None, neutral):
            raise InputError(
                f"the model's generation_config sets {name} to {value!r}, which is not supported; "
                f"set model.generation_config.{name} = {neutral!r}"
            )
