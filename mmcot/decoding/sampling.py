"""The choice of the next token: greedy, or sampling by temperature, top-k, top-p and min-p, with seeds by text."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence

import torch

from mmcot.errors import InputError


@dataclasses.dataclass(frozen=True, slots=True)
class Sampling:
    """How to choose a token; the names and meanings are those of transformers' ``GenerationConfig``.

    A token is drawn from softmax(logits / temperature), of which the ``top_k`` most probable tokens are kept (0: all),
    of these the most probable ones that together have a probability of ``top_p`` (arXiv:1904.09751, section 3.1), and
    of these the tokens with at least ``min_p`` times the probability of the first (arXiv:2407.01082). Temperature 0 is
    greedy. The drawn number depends on ``seed``, the text's key and the position alone.

    Before that the logit of a token that has occurred is divided by ``repetition_penalty``, or multiplied where it is
    below 0 (arXiv:1909.05858, section 4.1), and no sequence of ``no_repeat_ngram_size`` tokens occurs twice (0: any
    may).
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise InputError(f"temperature ({self.temperature}) must be 0, which is greedy, or above")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p ({self.top_p}) must be above 0 and at most 1; 1 keeps every token")
        if self.top_k < 0:
            raise InputError(f"top_k ({self.top_k}) must be 0, which keeps every token, or above")
        if not 0 <= self.min_p < 1:
            raise InputError(f"min_p ({self.min_p}) must be at least 0, which keeps every token, and below 1")
        if not self.repetition_penalty > 0:
            raise InputError(
                f"repetition_penalty ({self.repetition_penalty}) must be above 0; 1 leaves the logits as they are"
            )
        if self.no_repeat_ngram_size < 0:
            raise InputError(f"no_repeat_ngram_size ({self.no_repeat_ngram_size}) must be 0, which is off, or above")

    @property
    def has_rules(self) -> bool:
        """Whether logits depend on the tokens before, beyond what the model makes of them."""
        return self.repetition_penalty != 1 or self.no_repeat_ngram_size > 0


GREEDY = Sampling()

MOST_PROBABLE = 256  # tokens that are sorted first; a row that needs more has its whole vocabulary sorted


def draw_key(key: str, *, turn: int = 0, candidate: int = 0) -> str:
    """The name by which a text draws: of its question, the turn of a conversation or search, and the candidate."""
    return json.dumps([key, turn, candidate]) if turn or candidate else key


def draw_uniform(seed: int, key: str, position: int) -> float:
    """Return a pseudorandom number in [0, 1) of 53 bits, a function of the arguments."""
    digest = hashlib.blake2b(f"{seed}/{position}/{key}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def sample_tokens(
    logits_BV: torch.Tensor,
    uniform_B: Sequence[float],
    *,
    temperature: float,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
) -> list[int]:
    """Evaluate each row's inverse cumulative distribution at ``uniform_B``, in float64.

    Tokens are sorted by falling probability, the lower token first among equals, and truncated as ``Sampling`` says.
    """
    probabilities_BV = (logits_BV.double() / temperature).softmax(dim=-1)
    limits = top_k or probabilities_BV.shape[1], top_p, min_p
    if limits == (probabilities_BV.shape[1], 1.0, 0.0) and probabilities_BV.shape[1] > MOST_PROBABLE:
        return _draw_from_all(probabilities_BV, uniform_B)
    return _draw(probabilities_BV, uniform_B, *limits)


def _draw_from_all(probabilities_BV: torch.Tensor, uniform_B: Sequence[float]) -> list[int]:
    """Tokens drawn without truncation; the vocabulary is sorted for those rows alone that draw an improbable token."""
    largest_BN, tokens_BN = _most_probable(probabilities_BV, MOST_PROBABLE)
    mass_B1 = probabilities_BV.sum(dim=-1, keepdim=True)
    drawn_B1 = torch.tensor(uniform_B, dtype=torch.float64, device=mass_B1.device)[:, None] * mass_B1
    places_B1 = torch.searchsorted(largest_BN.cumsum(dim=-1), drawn_B1, right=True).clamp(max=MOST_PROBABLE - 1)
    tokens = tokens_BN.gather(1, places_B1)[:, 0].tolist()
    # Of several tokens as probable as the last one, those beyond may be lower.
    is_beyond_B = (largest_BN.gather(1, places_B1) <= largest_BN[:, -1:])[:, 0]
    if beyond := is_beyond_B.nonzero()[:, 0].tolist():
        others = probabilities_BV[beyond], [uniform_B[row] for row in beyond]
        for row, token in zip(beyond, _draw(*others, probabilities_BV.shape[1], 1.0, 0.0), strict=True):
            tokens[row] = token
    return tokens


def _draw(
    probabilities_BV: torch.Tensor, uniform_B: Sequence[float], top_k: int, top_p: float, min_p: float
) -> list[int]:
    """Tokens drawn from those that are kept."""
    limits = top_k, top_p, min_p
    sorted_BV, tokens_BV = _by_falling_probability(probabilities_BV, *limits)
    cumulative_BV = sorted_BV.cumsum(dim=-1)
    num_kept_B1 = _num_kept(sorted_BV, *limits)
    mass_B1 = cumulative_BV.gather(1, num_kept_B1 - 1)
    drawn_B1 = torch.tensor(uniform_B, dtype=torch.float64, device=mass_B1.device)[:, None] * mass_B1
    places_B1 = torch.searchsorted(cumulative_BV, drawn_B1, right=True)
    return tokens_BV.gather(1, places_B1.minimum(num_kept_B1 - 1))[:, 0].tolist()


def _num_kept(sorted_BN: torch.Tensor, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """How many of a row's first tokens are kept, [B, 1], at least one."""
    first_BN = sorted_BN[:, :top_k]
    cumulative_BN = first_BN.cumsum(dim=-1)
    mass = cumulative_BN[:, -1:] if top_k < sorted_BN.shape[1] else 1.0  # of what top_k keeps
    is_kept_BN = (cumulative_BN - first_BN) < top_p * mass
    is_kept_BN &= first_BN >= min_p * first_BN[:, :1]
    return is_kept_BN.sum(dim=-1, keepdim=True)


def _by_falling_probability(
    probabilities_BV: torch.Tensor, top_k: int, top_p: float, min_p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities and their tokens, the lower token first among equals; at least those that are kept, [B, N].

    Finding the largest values takes a fraction of the time of sorting a vocabulary.
    """
    vocabulary = probabilities_BV.shape[1]
    number = max(MOST_PROBABLE, top_k + 1 if top_k < vocabulary else 0)
    if (top_p < 1 or min_p > 0 or top_k < vocabulary) and vocabulary > number:
        largest_BN, tokens_BN = _most_probable(probabilities_BV, number)
        num_kept_B1 = _num_kept(largest_BN, top_k, top_p, min_p)
        # Of several tokens as probable as the last one, those beyond may be lower: then all are needed.
        is_whole_B1 = largest_BN.gather(1, num_kept_B1 - 1) > largest_BN[:, -1:]
        if bool(is_whole_B1.all()):
            return largest_BN, tokens_BN
    return probabilities_BV.sort(dim=-1, descending=True, stable=True)


def _most_probable(probabilities_BV: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest probabilities and their tokens, [B, number], the lower token first among equals of these."""
    tokens_BN = probabilities_BV.topk(number, dim=-1, sorted=False).indices.sort(dim=-1).values
    largest_BN, order_BN = probabilities_BV.gather(1, tokens_BN).sort(dim=-1, descending=True, stable=True)
    return largest_BN, tokens_BN.gather(1, order_BN)
