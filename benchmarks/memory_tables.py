"""The tables that the pages show of docs/data/memory.json; measures nothing.

    python benchmarks/memory_tables.py [FILE]      # writes them into docs/scale.md and docs/scienceqa.md

A page has ``<!-- memory: NAME -->`` before a table and ``<!-- memory: end -->`` after it. GB are 10^9 bytes.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
DATA = ROOT / "docs" / "data" / "memory.json"
PAGES = (ROOT / "docs" / "scale.md", ROOT / "docs" / "scienceqa.md")
PRESETS = {  # name: size, ZeRO stage, GPUs, activation checkpointing, bytes of a parameter in generation
    "scienceqa-base": ("base", 1, 1, False, 4),
    "scienceqa-large": ("large", 1, 4, False, 4),  # what auto chooses on cards of 24 GB
    "scienceqa-xl": ("xl", 3, 8, True, 2),
}
_TABLE = re.compile(r"(<!-- memory: (\w+) -->\n).*?(<!-- memory: end -->)", re.DOTALL)
Result = dict[str, Any]


def tables(result: Result) -> dict[str, str]:
    """Each table's Markdown by its name."""
    return {
        "combinations": combinations(result),
        "parameters": parameters(result),
        "tokens": tokens(result),
        "presets": presets(result),
    }


def filled(page: str, made: dict[str, str]) -> str:
    """The page with its tables replaced; KeyError for a name that no table has."""
    return _TABLE.sub(lambda match: f"{match[1]}{made[match[2]]}\n{match[3]}", page)


def combinations(result: Result) -> str:
    """Every combination that was measured; one that could not run shows its error."""
    rows = []
    for one in result["combinations"]:
        notes = ["checkpointing"] * one["checkpointing"] + ["offload"] * (one["offload"] != "none")
        notes += ["LoRA"] * (one["trains"] == "lora")
        head = [f"{one['size']}, {one['precision']}", f"{one['zero_stage']}, {one['gpus']}", ", ".join(notes)]
        if "error" in one:
            rows.append([*head, f"did not run: {one['error']}", *[""] * 5])
            continue
        own = one["shapes"][:3]
        peaks = [f"{_gb(shape['peak_bytes'])}{_where(shape)}" for shape in own]
        values = [_gb(one["steady_bytes"]), _gb(max(shape["update_bytes"] for shape in own)), *peaks]
        rows.append([*head, str(own[0]["rows"]), *values, _gb(own[-1]["reserved_bytes"])])
    head = ["model", "ZeRO, GPUs", "with", "rows", "between steps", "update"]
    return _table([*head, "96 + 64", "512 + 64", "512 + 512", "reserved"], rows)


def _where(shape: Result) -> str:
    """A mark where the peak is not in the blocks but in the update."""
    return "*" if shape["update_bytes"] >= shape["blocks_bytes"] else ""


def parameters(result: Result) -> str:
    """Bytes a parameter that do not depend on the blocks, by least squares over the three sizes."""
    rows = []
    chosen = [
        one
        for one in result["combinations"]
        if not one["checkpointing"] and one["offload"] == "none" and one["trains"] == "all"
    ]
    for stage, gpus in sorted({(one["zero_stage"], one["gpus"]) for one in chosen}):
        of_stage = [one for one in chosen if (one["zero_stage"], one["gpus"]) == (stage, gpus) and "error" not in one]
        if len(of_stage) < 2:
            continue
        sizes = [one["parameters"] for one in of_stage]
        first = [one["shapes"][0] for one in of_stage]
        cells = []
        for values in (
            [one["steady_bytes"] for one in of_stage],
            [shape["before_update_bytes"] for shape in first],
            [shape["update_bytes"] for shape in first],
        ):
            (slope, constant), error = fitted([[size, 1] for size in sizes], values)
            cells += [f"{slope:.2f} P {'+' if constant >= 0 else '-'} {abs(constant) / 1e9:.2f} GB ({error:.1%})"]
        rows.append([f"{stage}, {gpus}", ", ".join(one["size"] for one in of_stage), *cells])
    return _table(["ZeRO, GPUs", "from", "between steps", "before the update", "update"], rows)


def tokens(result: Result) -> str:
    """Bytes of a block's activations above what is there before it, by least squares over the sweep."""
    rows = []
    for one in result["combinations"]:
        if "error" in one or len(one["shapes"]) <= 3:
            continue
        (source, target, constant), error = token_fit(one)
        longest = next(s for s in one["shapes"] if (s["rows"], s["source"], s["target"]) == (8, 512, 512))
        values = [f"{source / 1e3:,.0f}", f"{target / 1e3:,.0f}", f"{constant / 1e9:.2f}", f"{error:.0%}"]
        above = _gb(longest["blocks_bytes"] - longest["before_update_bytes"])
        rows.append([one["size"], "yes" if one["checkpointing"] else "no", *values, above])
    head = ["model", "checkpointing", "kB a source token", "kB a target token", "constant, GB", "largest error"]
    return _table([*head, "8 × (512 + 512), GB"], rows)


def token_fit(one: Result) -> tuple[np.ndarray, float]:
    """Bytes of a source token, of a target token and of every block, and the largest relative error."""
    shapes = one["shapes"]
    return fitted(
        [[s["rows"] * s["source"], s["rows"] * s["target"], 1] for s in shapes],
        [s["blocks_bytes"] - s["before_update_bytes"] for s in shapes],
    )


def fitted(factors: Sequence[Sequence[float]], values: Sequence[float]) -> tuple[np.ndarray, float]:
    """Coefficients of least squares, and the largest error relative to its value."""
    matrix, wanted = np.asarray(factors, dtype=np.float64), np.asarray(values, dtype=np.float64)
    scale = np.abs(matrix).max(axis=0)
    found = np.linalg.lstsq(matrix / scale / wanted[:, None], np.ones(len(wanted)), rcond=None)[0] / scale
    return found, float(np.abs(matrix @ found / wanted - 1).max())


def presets(result: Result) -> str:
    """What the presets take: measured in training, from the number of parameters elsewhere."""
    rows = []
    for name, (size, stage, gpus, checkpointing, width) in PRESETS.items():
        (one,) = (
            one
            for one in result["combinations"]
            if (one["size"], one["zero_stage"], one["gpus"], one["checkpointing"], one["offload"], one["trains"])
            == (size, stage, gpus, checkpointing, "none", "all")
        )
        count, (typical, _, longest) = one["parameters"], one["shapes"][:3]
        precision = "bf16" if width == 2 else "fp32"
        training = [_gb(one["steady_bytes"]), _gb(typical["peak_bytes"]), _gb(longest["peak_bytes"])]
        training = [f"{value} GB" for value in training]
        held = [f"{_gb(12 * count)} GB", f"{_gb(width * count)} GB ({precision})"]
        where = f"{stage}, {('one', 'four', 'eight')[(1, 4, 8).index(gpus)]}"
        rows.append([f"`{name}`", f"{count:,}", where, *training, *held])
    head = ["preset", "parameters", "ZeRO, GPUs", "a GPU between steps", "peak, 96 + 64 tokens", "peak, 512 + 512"]
    return _table([*head, "a checkpoint, at least", "a generation worker's weights"], rows)


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |") for cells in lines)


if __name__ == "__main__":
    found = json.loads(Path(sys.argv[1] if len(sys.argv) > 1 else DATA).read_text(encoding="utf-8"))
    made = tables(found)
    for path in PAGES:
        path.write_text(filled(path.read_text(encoding="utf-8"), made), encoding="utf-8")
