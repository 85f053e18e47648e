"""An optimizer step of base and large: seconds, MFU, busy share, launches, waits; and what settings change in it."""

from __future__ import annotations

import math
from typing import Any

from benchmarks.gpu_parts import unjudged
from benchmarks.gpu_parts.machine import DEVICE, Proof, free_memory, profile_of, seconds_of, unexpected, waits_of
from benchmarks.gpu_parts.models import shape_of
from benchmarks.gpu_parts.steps import INTENDED_WAITS, PRECISION, SHAPES, BlockShape, Trainer, one_rank
from launcher.config.settings import Training
from mmcot.models.device import DTYPES
from mmcot.models.flops import measure_peak_flops

# Settings of ``training`` that are measured one by one on the first shape of the first size, the others as in the
# proof (ZeRO-1, bf16). A new setting is a line here: its name, and its fields of ``Training``.
SWITCHES: dict[str, dict[str, Any]] = {
    "zero_stage=2": {"zero_stage": 2},
    "zero_stage=3": {"zero_stage": 3},
    "activation_checkpointing": {"activation_checkpointing": True},
    "fp32": {"precision": "fp32"},
    "fp32, tf32": {"precision": "fp32", "tf32": True},
    "offload=cpu": {"offload": "cpu"},
}
CHANGE_NUMBERS = {"precision", "tf32"}
LAYERS_OF_TRANSFORMERS = "transformers' own T5 layers"


def training(proof: Proof) -> dict[str, Any]:
    """Base and large at three shapes, then every switch on the first shape."""
    if not proof.judged:
        unjudged.keep_any_graph()
    sizes = ("tiny",) if proof.tiny else ("base", "large")
    peak = measure_peak_flops(DEVICE, DTYPES[PRECISION]) / 1e12
    result: dict[str, Any] = {"peak_tflops": peak, "steps": [], "switches": {}}
    with one_rank():
        for size in sizes:
            for cuda_graphs in (False, True):
                result["steps"] += steps_of_size(size, peak, cuda_graphs=cuda_graphs)
                proof.keep(result)
        result["graphs"] = [graphs_beside_none(sizes[0], precision) for precision in ("fp32", PRECISION)]
        for name, settings in SWITCHES.items():
            result["switches"][name] = switched(sizes[0], settings, result["steps"][0])
            proof.keep(result)
        result["switches"][LAYERS_OF_TRANSFORMERS] = with_layers_of_transformers(sizes[0], result["steps"][0])
    first, best = result["steps"][0], max(result["steps"], key=lambda row: row["mfu"])
    return {
        **result,
        "headline": f"{first['model']} {first['block']}: {first['seconds'] * 1e3:.0f} ms, MFU {first['mfu']:.1%}"
        + (f", busy {first['busy_share']:.0%}, {first['launches']:,} launches" if "launches" in first else "")
        + f"; best MFU {best['mfu']:.1%} at {best['block']}{', graphs' if best['graphs'] else ''}",
        "checks": {
            "every loss is finite": all(math.isfinite(row["loss"]) for row in rows_of(result)),
            "a step waits nowhere but where it must": not any(
                unexpected(row["waits"], INTENDED_WAITS) for row in result["steps"]
            ),
            **{
                f"graphs compute the losses and norms of a training without them, {row['precision']}": row["agrees"]
                for row in result["graphs"]
            },
            "switches that change no number change no loss": all(
                is_same_loss(result["switches"][name]["loss"], first["loss"])
                for name, settings in SWITCHES.items()
                if "loss" in result["switches"][name] and not settings.keys() & CHANGE_NUMBERS
            ),
        },
    }


def rows_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [*result["steps"], *(row for row in result["switches"].values() if "loss" in row)]


def is_same_loss(found: float, expected: float) -> bool:
    """Within bf16's rounding; the steps before are the same too."""
    return abs(found - expected) <= 2e-2 * abs(expected)


def steps_of_size(size: str, peak_tflops: float, *, cuda_graphs: bool) -> list[dict[str, Any]]:
    """A row for each shape."""
    trainer, rows = Trainer(size, cuda_graphs=cuda_graphs), []
    for shape in SHAPES[size]:
        row = measured(trainer, shape, times=5)
        step, counts = trainer.step_of(shape)
        row["mfu"] = counts["flops"] / row["seconds"] / (peak_tflops * 1e12)
        row["waits"] = waits_of(lambda step=step, counts=counts: trainer.run(step, counts))
        rows.append({"model": size, "graphs": cuda_graphs, **row})
    trainer.close()
    return rows


def measured(trainer: Trainer, shape: BlockShape, *, times: int) -> dict[str, Any]:
    """Seconds, loss, launches, busy share and peak memory of steps of two blocks."""
    step, counts = trainer.step_of(shape)
    losses: list[float] = []

    def run() -> None:
        losses.append(trainer.run(step, counts))

    for _ in range(3 if trainer.graphs else 1):  # a graph is captured at the second block of a shape
        run()
    free_memory()
    seconds = seconds_of(run, times)
    found = {
        "block": str(shape),
        "seconds": seconds,
        "loss": losses[0],
        "tokens_per_s": counts["real_tokens"] / seconds,
        "peak_gib": trainer.peak_gib(),
    }
    profile = profile_of(run)
    if profile:
        found |= profile | {"busy_share": profile["kernel_s"] / seconds}
    return found


def switched(size: str, settings: dict[str, Any], compared: dict[str, Any]) -> dict[str, Any]:
    """A step of the first shape with other settings; ``ratio`` is its time relative to the step without them."""
    if unknown := sorted(settings.keys() - Training.model_fields.keys()):
        return {"not run": f"this version has no setting {', '.join(unknown)}"}
    trainer = Trainer(size, **settings)
    row = measured(trainer, SHAPES[size][0], times=3)
    trainer.close()
    return row | {"ratio": row["seconds"] / compared["seconds"]}


def graphs_beside_none(size: str, precision: str) -> dict[str, Any]:
    """Losses and gradient norms of four steps with dropout, by graphs and without."""
    found = {}
    for cuda_graphs in (False, True):
        stage = 0 if precision == "fp32" else 1
        trainer = Trainer(size, dropout=0.1, zero_stage=stage, precision=precision, cuda_graphs=cuda_graphs)
        step, counts = trainer.step_of(SHAPES[size][0])
        found[cuda_graphs] = []
        for _ in range(4):
            loss = trainer.run(step, counts)
            found[cuda_graphs] += [loss, float(trainer.engine.get_global_grad_norm())]
        failure = trainer.graphs.failure if trainer.graphs else None
        trainer.close()
    tolerance = 1e-4 if precision == "fp32" else 2e-2
    pairs = zip(found[False], found[True], strict=True)
    agrees = failure is None and all(abs(a - b) <= tolerance * max(1.0, abs(a)) for a, b in pairs)
    return {
        "precision": precision,
        "without": found[False],
        "graphs": found[True],
        "failure": failure,
        "agrees": agrees,
    }


def with_layers_of_transformers(size: str, compared: dict[str, Any]) -> dict[str, Any]:
    """The same with T5's layers as transformers has them, in place of those of ``mmcot/models/lean_t5.py``."""
    from mmcot.models import t5

    lean, t5.make_lean = t5.make_lean, lambda model: None
    try:
        row = switched(size, {}, compared)
    finally:
        t5.make_lean = lean
    return row | {"size": size, "num_layers": shape_of(size)["num_layers"]}
