"""Plots of a tuning: parallel coordinates, importance of settings, best so far."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np


def plot_trials(trials: list[dict[str, Any]], folder: Path, *, objective: str, mode: str) -> list[Path]:
    """Draw the plots of the trials that reported the objective; returns the files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    known = [trial for trial in trials if trial[objective] is not None]
    names = sorted({name for trial in known for name in trial["values"]})
    values = np.array([trial[objective] for trial in known], dtype=float)
    drawn = {
        "best": lambda axes: _best_so_far(axes, values, mode),
        "parallel": lambda axes: _parallel(axes, known, names, values, mode),
    }
    if len(known) >= 4 and names:
        drawn["importance"] = lambda axes: _importance(axes, known, names, values)
    paths = []
    for name, draw in drawn.items():
        figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
        draw(axes)
        axes.set_title(f"{objective}: {name}")
        figure.savefig(path := folder / f"{name}.png", dpi=110)
        pyplot.close(figure)
        paths.append(path)
    return paths


def correlations(trials: list[dict[str, Any]], names: list[str], values: np.ndarray) -> dict[str, float]:
    """Absolute Spearman correlation of each setting with the objective; for text and switches the correlation ratio."""
    found = {}
    ranks = _ranks(values)
    for name in names:
        chosen = [trial["values"].get(name) for trial in trials]
        if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in chosen):
            own = _ranks(np.array(chosen, dtype=float))
            found[name] = 0.0 if own.std() == 0 or ranks.std() == 0 else abs(float(np.corrcoef(own, ranks)[0, 1]))
        else:  # the correlation ratio: which part of the ranks' variance is between the groups
            groups = [ranks[[value == other for other in chosen]] for value in {str(v): v for v in chosen}.values()]
            between = sum(len(group) * (group.mean() - ranks.mean()) ** 2 for group in groups if len(group))
            found[name] = math.sqrt(between / max(1e-12, ((ranks - ranks.mean()) ** 2).sum()))
    return found


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = counts.cumsum()
    return (ends - (counts - 1) / 2)[inverse]


def _best_so_far(axes: Any, values: np.ndarray, mode: str) -> None:
    best = (np.minimum if mode == "min" else np.maximum).accumulate(values)
    axes.plot(range(1, len(values) + 1), values, "o", alpha=0.5, label="trial")
    axes.step(range(1, len(values) + 1), best, where="post", label="best so far")
    axes.set_xlabel("trial")
    axes.legend()


def _parallel(axes: Any, trials: list[dict[str, Any]], names: list[str], values: np.ndarray, mode: str) -> None:
    from matplotlib import pyplot

    columns = np.array(
        [_scaled([trial["values"].get(name) for trial in trials]) for name in names] + [_scaled(values.tolist())]
    ).T
    goodness = _scaled(values.tolist()) if mode == "max" else 1 - _scaled(values.tolist())
    for line, good in sorted(zip(columns.tolist(), goodness, strict=True), key=lambda pair: pair[1]):
        axes.plot(line, color=pyplot.cm.viridis(good), alpha=0.8)
    axes.set_xticks(range(len(names) + 1), [*names, "objective"], rotation=15, ha="right")
    axes.set_yticks([0, 1], ["low", "high"])


def _scaled(values: list[Any]) -> np.ndarray:
    """Values in 0..1: numbers by size (ranks where they span decades), others by their order of names."""
    if not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        order = sorted({str(value) for value in values})
        numbers = np.array([order.index(str(value)) for value in values], dtype=float)
    else:
        numbers = np.array(values, dtype=float)
        if numbers.min() > 0 and numbers.max() / numbers.min() > 30:
            numbers = np.log(numbers)
    spread = numbers.max() - numbers.min()
    return (numbers - numbers.min()) / spread if spread else np.full_like(numbers, 0.5)


def _importance(axes: Any, trials: list[dict[str, Any]], names: list[str], values: np.ndarray) -> None:
    found = sorted(correlations(trials, names, values).items(), key=lambda pair: pair[1])
    axes.barh([name for name, _ in found], [value for _, value in found])
    axes.set_xlim(0, 1)
    axes.set_xlabel("rank correlation with the objective, absolute")
