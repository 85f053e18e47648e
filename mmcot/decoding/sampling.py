"""Sampling of the next token: temperature, top-p and a seed for each question."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import torch

from mmcot.errors import InputError


@dataclasses.dataclass(frozen=True, slots=True)
class Sampling:
    """How to draw a token: from softmax(logits / temperature), truncated to its most probable ``top_p``.

    Temperature 0 is greedy. The drawn number depends on ``seed``, the question's key and the
    position alone.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise InputError(f"temperature ({self.temperature}) must be 0, which is greedy, or above")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p ({self.top_p}) must be above 0 and at most 1; 1 keeps every token")


GREEDY = Sampling()

MOST_PROBABLE = 256  # tokens that are sorted first; a row whose top_p needs more has its whole vocabulary sorted


def draw_uniform(seed: int, key: str, position: int) -> float:
    """Return a pseudorandom number in [0, 1) of 53 bits, a function of the arguments."""
    digest = hashlib.blake2b(f"{seed}/{position}/{key}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def sample_tokens(
    logits_BV: torch.Tensor, uniform_B: Sequence[float], *, temperature: float, top_p: float
) -> list[int]:
    """Evaluate each row's inverse cumulative distribution at ``uniform_B``, in float64.

    Tokens are sorted by falling probability. Those whose predecessors already have a
    probability of ``top_p`` are left out (arXiv:1904.09751, section 3.1).
    """
    probabilities_BV = (logits_BV.double() / temperature).softmax(dim=-1)
    sorted_BV, tokens_BV = _by_falling_probability(probabilities_BV, top_p)
    cumulative_BV = sorted_BV.cumsum(dim=-1)
    num_kept_B = ((cumulative_BV - sorted_BV) < top_p).sum(dim=-1)
    mass_B1 = cumulative_BV.gather(1, num_kept_B[:, None] - 1)
    drawn_B1 = torch.tensor(uniform_B, dtype=torch.float64, device=logits_BV.device)[:, None] * mass_B1
    places_B1 = torch.searchsorted(cumulative_BV, drawn_B1, right=True)
    return tokens_BV.gather(1, places_B1.minimum(num_kept_B[:, None] - 1))[:, 0].tolist()


def _by_falling_probability(probabilities_BV: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities and their tokens, the lower token first among equals; at least those that ``top_p`` keeps, [B, N].

    Finding the largest values takes a fraction of the time of sorting a vocabulary.
    """
    if top_p < 1 and probabilities_BV.shape[1] > MOST_PROBABLE:
        tokens_BN = probabilities_BV.topk(MOST_PROBABLE, dim=-1, sorted=False).indices.sort(dim=-1).values
        largest_BN, order_BN = probabilities_BV.gather(1, tokens_BN).sort(dim=-1, descending=True, stable=True)
        num_kept_B1 = ((largest_BN.cumsum(dim=-1) - largest_BN) < top_p).sum(dim=-1, keepdim=True)
        # Of several tokens as probable as the last one, those beyond may be lower: then all are needed.
        is_whole_B1 = largest_BN.gather(1, num_kept_B1 - 1) > largest_BN[:, -1:]
        if bool(is_whole_B1.all()):
            return largest_BN, tokens_BN.gather(1, order_BN)
    return probabilities_BV.sort(dim=-1, descending=True, stable=True)
