"""What one asks of an engine, and what it gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from mmcot.decoding.sampling import GREEDY, Sampling
from mmcot.errors import InputError


@dataclasses.dataclass(slots=True, eq=False)
class Source:
    """What a model reads before it writes: token ids and vision features [p, V], or None.

    Requests with the same ``Source`` object share its encoding. With ``keep_states`` it stays as long as the object
    does, for later requests and scores of the same engine; else it is made once for each call.
    """

    ids: Sequence[int]
    features: np.ndarray | None = None
    keep_states: bool = False
    kept: Any = dataclasses.field(default=None, init=False, repr=False)

    def states_of(self, engine: Any) -> Any:
        """The encoding that was kept for an engine; None where there is none."""
        return self.kept[1] if self.kept is not None and self.kept[0] is engine else None


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One text to write.

    Args:
        key: name of the question (its qid). With ``turn``, ``candidate`` and the seed of ``sampling`` it decides what
            is drawn, on every worker alike.
        turn: the number of the text in a conversation or a search.
        candidate: the number among several texts of the same question and turn.
        max_new_tokens: None is the engine's limit. A prefix counts.
        min_new_tokens: before so many tokens, those of a prefix included, nothing ends the text.
        prefix: token ids that the text has to begin with.
        stop: the text ends before the first of these strings that it would contain after its prefix.
        stop_token_ids: the text ends before any of these, as before an end token of the model.
        with_log_probs: also return the log-probability of every token.
        num_beams: above 1, beam search by transformers, which has neither sampling nor prefixes, stop strings,
            log-probabilities, repetition rules, a minimum length or a callback.
        on_token: called with each token's id as soon as it is known.

    Raises:
        InputError: values contradict each other.
    """

    source: Source
    key: str = ""
    turn: int = 0
    candidate: int = 0
    sampling: Sampling = GREEDY
    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    prefix: Sequence[int] = ()
    stop: Sequence[str] = ()
    stop_token_ids: Collection[int] = ()
    with_log_probs: bool = False
    num_beams: int = 1
    on_token: Callable[[int], None] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            raise InputError(f"stop ({self.stop!r}) must be a list of strings, such as [{self.stop!r}]")
        if not all(self.stop):
            raise InputError("stop contains an empty string, which every text contains; leave it out")
        if not self.source.ids:
            raise InputError(f"the source of request {self.key!r} has no tokens; give at least the end token")
        sampling = self.sampling
        if self.candidate and sampling.temperature == 0:
            raise InputError(
                f"candidate ({self.candidate}) needs sampling: at temperature 0 all candidates are the same text; set "
                "temperature above 0"
            )
        if self.num_beams > 1:
            self._check_beams()
        elif sampling.temperature > 0 and not self.key:
            raise InputError(f"sampling (temperature {sampling.temperature}) needs a key; give the question's qid")

    def _check_beams(self) -> None:
        if self.sampling.temperature > 0:
            raise InputError(
                f"num_beams ({self.num_beams}) above 1 goes with no sampling, temperature is "
                f"{self.sampling.temperature}; set one of them to its default"
            )
        others = {
            "prefix": bool(self.prefix),
            "stop": bool(self.stop) or bool(self.stop_token_ids),
            "with_log_probs": self.with_log_probs,
            "min_new_tokens": self.min_new_tokens > 0,
            "repetition rules": self.sampling.has_rules,
            "on_token": self.on_token is not None,
        }
        if given := [name for name, is_given in others.items() if is_given]:
            raise InputError(f"num_beams ({self.num_beams}) above 1 goes without {', '.join(given)}; leave these out")


@dataclasses.dataclass(frozen=True, slots=True)
class GeneratedText:
    """A generated text.

    ``finish`` is "eos", "length" where the limit truncated it, "stop" where a stop string or stop token ended it (the
    text ends before it), or "cancelled". ``num_tokens`` counts all tokens, those of a prefix and of the end too.
    ``log_probs`` has the log-probability of each of these tokens where it was asked for. ``ids`` are the tokens of the
    text without its end, from which a later request may go on.
    """

    text: str
    num_tokens: int
    finish: str
    log_probs: tuple[float, ...] = ()
    ids: tuple[int, ...] = dataclasses.field(default=(), repr=False)

    @property
    def log_prob(self) -> float:
        """The log-probability of the whole text, where it was asked for."""
        return sum(self.log_probs)


def candidates(request: Request, number: int) -> list[Request]:
    """The request for each of so many candidates of its question."""
    return [dataclasses.replace(request, candidate=candidate) for candidate in range(number)]
