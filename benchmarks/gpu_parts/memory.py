"""The peak of memory in tensors during training, compared with a forecast where there is one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu_parts.machine import ON_GPU, Proof, free_memory
from benchmarks.gpu_parts.steps import BlockShape, Trainer, one_rank

TOLERANCE = 0.05  # relative


class Case(NamedTuple):
    """A training of one GPU, and the rows, source and target tokens of its blocks."""

    size: str
    zero_stage: int
    shape: BlockShape
    checkpointing: bool = False

    @property
    def name(self) -> str:
        """Such as "base, ZeRO-1, 8 x (96 + 64)"."""
        checkpointing = ", checkpointing" if self.checkpointing else ""
        return f"{self.size}, ZeRO-{self.zero_stage}, {self.shape}{checkpointing}"


CASES = [
    Case("base", 1, BlockShape(8, 96, 64)),
    Case("base", 1, BlockShape(8, 512, 512)),
    Case("base", 1, BlockShape(8, 512, 512), checkpointing=True),
    Case("base", 0, BlockShape(8, 512, 512)),  # ZeRO-0 computes in fp32
    Case("base", 3, BlockShape(8, 512, 512)),
    Case("large", 1, BlockShape(2, 512, 512)),
]
TINY_CASES = list(dict.fromkeys(case._replace(size="tiny", shape=BlockShape(2, 24, 8)) for case in CASES))


def memory(proof: Proof) -> dict[str, Any]:
    """Peaks in GiB, and a check for each that the forecast has too."""
    forecast = read_forecast(proof.forecast) if proof.forecast else {}
    result: dict[str, Any] = {"peaks_gib": {}, "left_gib": {}, "forecast_gib": {}, "checks": {}}
    with one_rank():
        for case in TINY_CASES if proof.tiny else CASES:
            result["left_gib"][case.name] = free_memory()  # by the engines before, not in the peak
            found = result["peaks_gib"][case.name] = peak_of(case)
            if ON_GPU:
                result["checks"][f"{case.name}: memory was counted"] = found > 0
            if expected := forecast.get(case):
                result["forecast_gib"][case.name] = expected
                name = f"{case.name}: within {TOLERANCE:.0%} of the forecast"
                result["checks"][name] = is_as_forecast(found, expected)
            proof.keep(result)
    peaks = ", ".join(f"{peak:.1f}" for peak in result["peaks_gib"].values())
    return {**result, "headline": f"{peaks} GiB; {len(result['forecast_gib'])} compared with the forecast"}


def is_as_forecast(found_gib: float, expected_gib: float) -> bool:
    return abs(found_gib - expected_gib) <= TOLERANCE * expected_gib


def read_forecast(path: Path) -> dict[Case, float]:
    """The peaks of one GPU in GiB from a JSON of combinations.

    {"combinations": [{"size": "base", "zero_stage": 1, "gpus": 1, "checkpointing": false, "offload": "none",
                       "trains": "all",
                       "shapes": [{"rows": 8, "source": 96, "target": 64, "peak_bytes": 5000000000}]}]}
    """

    def case_of(found: dict[str, Any], shape: dict[str, Any]) -> Case:
        block = BlockShape(shape["rows"], shape["source"], shape["target"])
        return Case(found["size"], found["zero_stage"], block, found["checkpointing"])

    return {
        case_of(found, shape): shape["peak_bytes"] / 2**30
        for found in json.loads(path.read_text(encoding="utf-8"))["combinations"]
        if "error" not in found and found["gpus"] == 1 and found["offload"] == "none" and found["trains"] == "all"
        for shape in found["shapes"]
        if "peak_bytes" in shape
    }


def peak_of(case: Case) -> float:
    """The peak of the second optimizer step, which has all of the optimizer's state, with the presets' dropout."""
    settings = {"zero_stage": case.zero_stage, "activation_checkpointing": case.checkpointing}
    settings |= {} if case.zero_stage else {"precision": "fp32"}
    trainer = Trainer(case.size, dropout=0.1, **settings)
    step, counts = trainer.step_of(case.shape)
    trainer.run(step, counts)
    free_memory()
    trainer.run(step, counts)
    peak = trainer.peak_gib()
    trainer.close()
    return peak
