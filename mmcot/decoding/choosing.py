"""The next tokens of rows, from the logits of one step."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mmcot.decoding.row import Row
from mmcot.decoding.sampling import GREEDY, Sampling, sample_tokens


def choose_tokens(logits_BV: torch.Tensor, rows: Sequence[Row]) -> tuple[list[int], list[float | None]]:
    """The next token of each row, and its log-probability where the row asks for it.

    A row whose prefix is not written yet gets the prefix's token.
    """
    tokens = _choose(_after_rules(logits_BV, rows), rows)
    for place, row in enumerate(rows):
        if len(row.ids) < len(row.prefix):
            tokens[place] = row.prefix[len(row.ids)]
    return tokens, _log_probs(logits_BV, tokens, rows)


def _after_rules(logits_BV: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
    """The logits after repetition rules and minimum lengths; the argument stays as it is."""
    if not any(row.has_rules for row in rows):
        return logits_BV
    logits_BV = logits_BV.clone()
    for place, row in enumerate(rows):
        if seen := row.seen():
            values_N, penalty = logits_BV[place, seen], row.sampling.repetition_penalty
            logits_BV[place, seen] = torch.where(values_N < 0, values_N * penalty, values_N / penalty)
    if banned := [(place, token) for place, row in enumerate(rows) if row.has_rules for token in row.banned()]:
        places_N, tokens_N = torch.tensor(banned, device=logits_BV.device).T
        logits_BV[places_N, tokens_N] = float("-inf")
    return logits_BV


def _choose(logits_BV: torch.Tensor, rows: Sequence[Row]) -> list[int]:
    """Greedy tokens, and tokens drawn for the rows that sample."""
    places_of: dict[Sampling, list[int]] = {}
    for place, row in enumerate(rows):
        how = row.sampling if row.sampling.temperature > 0 else GREEDY
        places_of.setdefault(how, []).append(place)
    tokens = [0] * len(rows)
    for how, places in places_of.items():
        logits_NV = logits_BV if len(places) == len(rows) else logits_BV[places]
        if how is GREEDY:
            chosen = logits_NV.argmax(dim=-1).tolist()
        else:
            limits = {"top_p": how.top_p, "top_k": how.top_k, "min_p": how.min_p}
            draws = [rows[place].draw() for place in places]
            chosen = sample_tokens(logits_NV, draws, temperature=how.temperature, **limits)
        for place, token in zip(places, chosen, strict=True):
            tokens[place] = token
    return tokens


def _log_probs(logits_BV: torch.Tensor, tokens: Sequence[int], rows: Sequence[Row]) -> list[float | None]:
    found: list[float | None] = [None] * len(rows)
    if places := [place for place, row in enumerate(rows) if row.with_log_probs]:
        chosen_N1 = torch.tensor([tokens[place] for place in places], device=logits_BV.device)[:, None]
        logits_NV = (logits_BV if len(places) == len(rows) else logits_BV[places]).float()
        values = (logits_NV.gather(1, chosen_N1) - logits_NV.logsumexp(dim=-1, keepdim=True))[:, 0].tolist()
        for place, value in zip(places, values, strict=True):
            found[place] = value
    return found
