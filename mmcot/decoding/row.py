"""A text that is being written: its limits, its rules and its tokens so far."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from mmcot.decoding.sampling import GREEDY, Sampling, draw_uniform


@dataclasses.dataclass(slots=True, eq=False)
class Row:
    """A text and what it has to keep to.

    Attributes:
        max_new_tokens: its limit; a prefix counts.
        ends: tokens that end it.
        index: of its source, for the caller.
        key: by which it draws (``draw_key``), where it is sampled.
        prefix: ids that it begins with.
        min_new_tokens: before so many tokens, those of a prefix included, nothing ends it.
        is_stopped: called with the ids after the prefix after every token; whether they end the text.
        on_token: called with the row after every token.
        ids: the tokens so far, with the prefix, and with the token that ended it.
        log_probs: the natural logarithm of the probability of each of ``ids`` under the model, without temperature and
            rules, where ``with_log_probs``; else it is empty.
        finish: "end" by one of ``ends``, "stop" by ``is_stopped``, "length" or "cancelled"; None until then.
        before: ids before the text that its model reads in the same way as the text.
    """

    max_new_tokens: int
    ends: frozenset[int]
    index: int = 0
    sampling: Sampling = GREEDY
    key: str = ""
    prefix: Sequence[int] = ()
    min_new_tokens: int = 0
    with_log_probs: bool = False
    is_stopped: Callable[[list[int]], bool] | None = None
    on_token: Callable[[Row], None] | None = None
    ids: list[int] = dataclasses.field(default_factory=list)
    log_probs: list[float] = dataclasses.field(default_factory=list)
    finish: str | None = None
    before: Sequence[int] = ()

    @property
    def has_ended(self) -> bool:
        """Whether nothing more is written."""
        return self.finish is not None

    @property
    def is_plain(self) -> bool:
        """Whether the next token is the likeliest one, and nothing but the token is asked for."""
        is_greedy = self.sampling.temperature == 0 and not self.has_rules
        return is_greedy and not self.with_log_probs and len(self.ids) >= len(self.prefix)

    def next_input(self) -> tuple[int, int]:
        """The token that is read next, and its position."""
        return (self.ids[-1] if self.ids else self.before[-1]), len(self.ids)

    def add(self, token: int, log_prob: float | None = None) -> None:
        """Append a token; it may end the text."""
        self.ids.append(token)
        if log_prob is not None:
            self.log_probs.append(log_prob)
        if len(self.ids) > len(self.prefix):
            self.finish = self._finish()
        if self.on_token is not None:
            self.on_token(self)

    def _finish(self) -> str | None:
        length = len(self.ids)
        if length > self.min_new_tokens and self.ids[-1] in self.ends:
            return "end"
        if length >= self.min_new_tokens and self.is_stopped and self.is_stopped(self.ids[len(self.prefix) :]):
            return "stop"
        return "length" if length >= self.max_new_tokens else None

    def draw(self) -> float:
        """The pseudorandom number of the next token."""
        return draw_uniform(self.sampling.seed, self.key, len(self.ids))

    @property
    def has_rules(self) -> bool:
        """Whether the next token depends on more than the logits."""
        return self.sampling.has_rules or len(self.ids) < self.min_new_tokens

    def seen(self) -> list[int]:
        """The tokens whose logits the repetition penalty changes."""
        return sorted({*self.before, *self.ids}) if self.sampling.repetition_penalty != 1 else []

    def banned(self) -> set[int]:
        """The tokens that may not come next."""
        banned = _repeating([*self.before, *self.ids], self.sampling.no_repeat_ngram_size)
        return banned | self.ends if len(self.ids) < self.min_new_tokens else banned


def _repeating(ids: Sequence[int], size: int) -> set[int]:
    """The tokens after which some ``size`` tokens would occur a second time."""
    if not 0 < size <= len(ids):
        return set()
    tail = list(ids[len(ids) - size + 1 :])
    return {ids[i + size - 1] for i in range(len(ids) - size + 1) if list(ids[i : i + size - 1]) == tail}
