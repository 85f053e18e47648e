"""The engine: what a process needs to write and to score texts with one model, made once and used until it ends.

    engine = open_engine(model, tokenizer, num_rows=64, max_source_tokens=512, max_new_tokens=256)
    texts = engine.write([Request(Source(ids, features), key="1"), ...])       # in the order of the requests
    texts[0]                              # GeneratedText(text="Solution: ...", num_tokens=57, finish="eos")

    drawn = Request(source, key="1", sampling=Sampling(temperature=0.7, top_p=0.95, seed=0))
    texts = engine.write(candidates(drawn, 8))                                # eight texts, the source encoded once
    engine.score([source] * 8, [text.ids for text in texts])                  # log-probabilities, without writing

Texts may also come and go while others are written:

    writings = engine.submit(requests)    # they wait for rows
    while engine.is_busy:
        for writing in engine.step():     # one step of all rows; those that have ended
            writing.text
    engine.cancel(writing)                # at any time

A text depends on the model and its own request, not on what else is written: on a CPU bit for bit, on a GPU except for
rounding. The model's weights, dtype and device must not change while its engine is used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from mmcot.decoding.beams import search_beams
from mmcot.decoding.model_settings import end_tokens, ids_before_text
from mmcot.decoding.requests import GeneratedText, Request, Source
from mmcot.decoding.row import Row
from mmcot.decoding.rows import Rows, open_rows, read_batch
from mmcot.decoding.sampling import draw_key
from mmcot.decoding.source_batches import SourceBatch, batches_for
from mmcot.decoding.text_reading import TextReader
from mmcot.errors import InputError
from mmcot.models.contract import GenerativeModel

LOGITS_AT_ONCE = 1 << 26  # of texts that are scored together


@dataclasses.dataclass(slots=True, eq=False)
class Writing:
    """A request that was submitted; ``text`` is None until it has ended."""

    request: Request
    row: Row
    text: GeneratedText | None = None


class Engine:
    """A model's decoder and the texts that it writes; see the module's description and ``open_engine``.

    Attributes:
        rows: the texts as rows of token ids, with the counts of steps.
    """

    def __init__(
        self,
        model: GenerativeModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: Rows,
        *,
        feature_shape: tuple[int, int] | None,
    ) -> None:
        self._model, self.rows = model, rows
        self._feature_shape = feature_shape
        self._reader = TextReader(tokenizer, end_tokens(model, tokenizer))
        self._writings: dict[Row, Writing] = {}

    @property
    def is_busy(self) -> bool:
        """Whether texts are being written or wait."""
        return bool(self.rows)

    def submit(self, requests: Sequence[Request], *, batches: Iterable[SourceBatch] | None = None) -> list[Writing]:
        """Let texts wait for rows, behind those that were submitted before, those of long sources first.

        Args:
            batches: ``batch_sources`` of the requests' different sources in the order of their first request, where
                they were made ahead; the sources' features are not read then.

        Raises:
            InputError: a request does not fit this engine; nothing is submitted.
        """
        if beams := [request for request in requests if request.num_beams > 1]:
            raise InputError(
                f"{len(beams)} requests have num_beams above 1 ({beams[0].num_beams}); beam search has no rows: "
                "call write"
            )
        writings = [Writing(request, self._row(request, number)) for number, request in enumerate(requests)]
        rows_of = {id(request.source): [] for request in requests}
        sources = {id(request.source): request.source for request in requests}
        for writing in writings:
            rows_of[id(writing.request.source)].append(writing.row)
        self.rows.check([writing.row for writing in writings])
        if batches is None:
            self._keep_states(sources.values())
            kept = [(key, states) for key, source in sources.items() if (states := source.states_of(self)) is not None]
            self.rows.add_encoded([(row, states) for key, states in kept for row in rows_of.pop(key)])
            batches = self._batches([sources[key] for key in rows_of])
        self.rows.add(list(rows_of.values()), batches)
        self._writings |= {writing.row: writing for writing in writings}
        return writings

    def step(self) -> list[Writing]:
        """Advance all rows by a token, or a GPU's by the next few; returns the texts that have ended, not cancelled."""
        ended = [self._writings.pop(row) for row in self.rows.step() if row in self._writings]
        for writing in ended:
            writing.text = self._reader.text_of_row(writing.request, writing.row)
        return ended

    def cancel(self, writing: Writing) -> None:
        """End a text, unless it has ended; its row is free for another one at the next step."""
        if self._writings.pop(writing.row, None) is not None:
            self.rows.cancel(writing.row)
            writing.text = self._reader.text_of_row(writing.request, writing.row)

    def clear(self) -> None:
        """Forget all texts, such as after an error in ``step``; none of them ends any more."""
        self._writings.clear()
        self.rows.clear()

    def write(self, requests: Sequence[Request], *, on_step: Callable[[], None] = lambda: None) -> list[GeneratedText]:
        """Write texts and return them in the order of ``requests``; texts that were submitted before go on as well.

        Args:
            on_step: called whenever new tokens of all rows are known, or after every batch of a beam search.
        """
        plain = self.submit([request for request in requests if request.num_beams == 1])
        by_beams = [request for request in requests if request.num_beams > 1]
        found = search_beams(self._model, by_beams, self._batches, limit=self.rows.max_new_tokens, on_step=on_step)
        for writing in plain:
            while writing.text is None:
                self.step()
                on_step()
        texts = {id(writing.request): writing.text for writing in plain}
        texts |= {
            id(request): self._reader.text(request, ids, self._reader.ends)
            for request, ids in zip(by_beams, found, strict=True)
        }
        return [texts[id(request)] for request in requests]  # pyright: ignore[reportReturnType] (all have ended)

    @torch.inference_mode()
    def score(self, sources: Sequence[Source], texts: Sequence[Sequence[int]]) -> list[list[float]]:
        """The log-probability of every token of given texts, each after its source, without writing.

        Args:
            sources: one for each text; the same object is encoded once.
            texts: token ids, with the end token where its probability counts.

        Raises:
            InputError: the numbers differ, or a text has no tokens.
        """
        if len(sources) != len(texts):
            raise InputError(f"{len(sources)} sources are given for {len(texts)} texts; give one each")
        if empty := [number for number, text in enumerate(texts) if not len(text)]:
            raise InputError(f"text {empty[0]} has no tokens to score; give at least the end token")
        found: list[list[float]] = [[]] * len(texts)
        states = self._states_of(sources)
        for chosen in _in_parts([len(text) for text in texts], LOGITS_AT_ONCE // self._model.config.vocab_size):
            scored = self.rows.score([states[id(sources[n])] for n in chosen], [list(texts[n]) for n in chosen])
            for number, log_probs in zip(chosen, scored, strict=True):
                found[number] = log_probs
        return found

    def _states_of(self, sources: Iterable[Source]) -> dict[int, Any]:
        """The states of different sources, by their objects' ids."""
        different = {id(source): source for source in sources}
        self._keep_states(different.values())
        kept = {key: source.states_of(self) for key, source in different.items()}
        states = {key: own for key, own in kept.items() if own is not None}
        others = [source for key, source in different.items() if key not in states]
        return states | {id(source): own for source, own in self._encode(others)}

    def _keep_states(self, sources: Iterable[Source]) -> None:
        new = [source for source in sources if source.keep_states and source.states_of(self) is None]
        for source, own in self._encode(new):
            source.kept = self, own

    @torch.inference_mode()
    def _encode(self, sources: Sequence[Source]) -> Iterator[tuple[Source, Any]]:
        for batch in self._batches(sources):
            for index, states in zip(batch.indices, read_batch(self.rows.read, batch.inputs), strict=True):
                yield sources[index], states

    def _batches(self, sources: Sequence[Source]) -> Iterator[SourceBatch]:
        features = [source.features for source in sources]
        without = sum(array is None for array in features)
        if 0 < without < len(features):
            raise InputError(
                f"{len(features) - without} of {len(features)} sources have features; give all of them features, of "
                "shape (0, V) where there is no picture, or none"
            )
        ids = [source.ids for source in sources]
        return batches_for(self._model, ids, features, feature_shape=self._feature_shape or (1, 1))

    def _row(self, request: Request, number: int) -> Row:
        return Row(
            index=number,
            max_new_tokens=self.rows.max_new_tokens if request.max_new_tokens is None else request.max_new_tokens,
            ends=self._reader.ends.union(request.stop_token_ids),
            sampling=request.sampling,
            key=draw_key(request.key, turn=request.turn, candidate=request.candidate),
            prefix=tuple(request.prefix),
            min_new_tokens=request.min_new_tokens,
            with_log_probs=request.with_log_probs,
            is_stopped=self._reader.stop_check(request.stop) if request.stop else None,
            on_token=_passing_on(request.on_token) if request.on_token else None,
            before=ids_before_text(self._model, request.source.ids),
        )


def open_engine(
    model: GenerativeModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_rows: int,
    max_source_tokens: int,
    max_new_tokens: int,
    feature_shape: tuple[int, int] | None = None,
    on_part: Callable[[], None] = lambda: None,
) -> Engine:
    """Prepare a model for sources and texts of at most these lengths, ``num_rows`` of them at a time.

    Args:
        feature_shape: [P, V] of the sources' features, an array of theirs is [p, V] with p <= P; None without features.
        on_part: called whenever sources were encoded or assigned to rows.

    Raises:
        InputError: the model cannot be decoded, such as one without a cache, or its ``generation_config`` sets what
            would be ignored.
    """
    rows = open_rows(
        model,
        num_rows=num_rows,
        max_source_tokens=max_source_tokens,
        max_new_tokens=max_new_tokens,
        on_part=on_part,
    )
    return Engine(model, tokenizer, rows, feature_shape=feature_shape)


def _passing_on(on_token: Callable[[int], None]) -> Callable[[Row], None]:
    return lambda row: on_token(row.ids[-1])


def _in_parts(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """The numbers of texts in parts that have at most ``most`` tokens, or one text."""
    chosen, num_tokens = [], 0
    for number, length in enumerate(lengths):
        if chosen and num_tokens + length > most:
            yield chosen
            chosen, num_tokens = [], 0
        chosen.append(number)
        num_tokens += length
    if chosen:
        yield chosen
