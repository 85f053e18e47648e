"""From token ids to texts: where a text ends, and at which stop string."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from mmcot.decoding.requests import GeneratedText, Request
from mmcot.decoding.row import Row

BYTES_PER_CHARACTER = 4  # at most, in UTF-8


class TextReader:
    """A tokenizer, and the tokens that end a text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: frozenset[int]) -> None:
        self._tokenizer, self.ends = tokenizer, ends

    def stop_check(self, stop: Sequence[str]) -> Callable[[list[int]], bool]:
        """Whether ids contain a stop string in their last tokens."""
        tail = BYTES_PER_CHARACTER * max(map(len, stop)) + 8  # a token is a byte at least

        def is_stopped(ids: list[int]) -> bool:
            text = self._decode(ids[-tail:])
            return any(string in text for string in stop)

        return is_stopped

    def text_of_row(self, request: Request, row: Row) -> GeneratedText:
        """The text of a row that has ended."""
        text = self.text(request, row.ids, row.ends, log_probs=row.log_probs)
        return dataclasses.replace(text, finish="cancelled") if row.finish == "cancelled" else text

    def text(
        self, request: Request, ids: Sequence[int], ends: frozenset[int], *, log_probs: Sequence[float] = ()
    ) -> GeneratedText:
        """The text of ids up to its end token, and up to a stop string."""
        start = max(len(request.prefix), request.min_new_tokens)
        length = next((place for place in range(start, len(ids)) if ids[place] in ends), None)
        own, ended = ids[:length], length is not None
        text = self._decode(own)
        first = len(self._decode(request.prefix)) if request.stop and request.prefix else 0
        found = [place for string in request.stop if (place := text.find(string, first)) >= 0]
        finish = "stop" if found or (ended and ids[len(own)] not in self.ends) else "eos" if ended else "length"
        num_tokens = len(own) + ended
        return GeneratedText(
            text[: min(found, default=len(text))], num_tokens, finish, tuple(log_probs[:num_tokens]), tuple(own)
        )

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))
