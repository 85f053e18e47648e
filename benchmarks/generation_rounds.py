"""Rounds of several engines in turns, and what is computed from them.

written = in_rounds({"ours": write, ...}, rounds=3, left_out)
compare(written, base="transformers")   # {"ours": {"ratio": {"median": 4.6, ...}, ...}, ...}
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from peers.environments import PeerError
from results import ratios, spread, summary

Ids = list[list[int]]


@dataclass(frozen=True, slots=True)
class Written:
    """All texts as ids, each up to and with its end token, and the seconds of the processor that they took."""

    ids: list[list[int]]
    seconds: float

    @property
    def num_tokens(self) -> int:
        """Tokens of all texts."""
        return sum(map(len, self.ids))


Write = Callable[[], Written]


def in_rounds(engines: dict[str, Write], rounds: int, left_out: dict[str, str]) -> dict[str, list[Written]]:
    """What the engines write, one after the other in every round; one that fails is left out."""
    written: dict[str, list[Written]] = {engine: [] for engine in engines}
    for number in range(rounds):
        for engine in list(written):
            try:
                written[engine].append(engines[engine]())
            except PeerError as error:
                leave_out(left_out, engine, error)
                del written[engine]
                continue
            last = written[engine][-1]
            print(f"round {number + 1}, {engine}: {last.num_tokens} tokens, {last.seconds:.1f} s", flush=True)
    return written


def compare(written: dict[str, list[Written]], base: str) -> dict[str, dict[str, Any]]:
    """Tokens a CPU-second of each engine, and the ratios to the base round by round."""
    rates = {engine: [each.num_tokens / each.seconds for each in rounds] for engine, rounds in written.items()}
    found = {}
    for engine, values in rates.items():
        ratio = ratios(values, rates[base])
        found[engine] = {"tokens_per_processor_second": summary(values), "ratio": ratio}
        found[engine]["tokens"] = written[engine][0].num_tokens
        print(f"{engine:<40} {found[engine]['tokens_per_processor_second']['median']:7.0f} tokens/s   x{spread(ratio)}")
    return found


def equality(reference: Ids, rounds: Sequence[Written], margin: Callable[[int, int], float]) -> dict[str, Any]:
    """How many texts equal the reference in every round, and where the others first differ.

    Args:
        margin: between the two best logits of the reference for a source's text (index) and one of its tokens (place).
    """
    differ_at = []
    for index, expected in enumerate(reference):
        other = next((written.ids[index] for written in rounds if written.ids[index] != expected), None)
        if other is not None:
            both = enumerate(zip(expected, other, strict=False))
            place = next((i for i, (a, b) in both if a != b), min(len(expected), len(other)))
            differ_at.append({"token": place, "margin": float(f"{margin(index, place):.3g}")})
    return {"equal_texts": len(reference) - len(differ_at), "texts": len(reference), "differ_at": differ_at}


def leave_out(left_out: dict[str, str], name: str, error: PeerError) -> None:
    """Name a program or an engine that is not measured (any more)."""
    left_out[name] = error.reason
    print(f"{name} is left out: {error}", flush=True)
