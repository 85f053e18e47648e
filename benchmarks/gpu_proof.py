"""Checks and measurements on a GPU with the product's own code, in nine minutes; a JSON each part.

    python benchmarks/gpu_proof.py --out DIR                      # all parts on the GPU of this machine
    python benchmarks/gpu_proof.py --out DIR --parts zero hang    # some of them
    python benchmarks/gpu_proof.py --out DIR --cpu                # every part at a tiny size on the CPU
    python benchmarks/gpu_proof.py --list

Needs torch, transformers, deepspeed, pydantic, psutil and pyarrow; neither Ray nor MLflow, typer, evaluate, webdataset
or a network. Each part runs in a process of its own with its own time limit and writes DIR/<part>.json when it ends;
what a part has found is kept where it fails or is too slow. DIR/<part>.log has its output. ``checks`` in the JSON
contains what must be true. The status is 1 if a check failed, else 0.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Part(NamedTuple):
    """A part: its time limit in seconds, and what it shows."""

    seconds: int
    shows: str


PARTS = {  # by the name of its module in benchmarks/gpu_parts and of its function
    "ceilings": Part(20, "matrix products, copies, launches: the reference of the other parts; TF32 is off"),
    "golden": Part(20, "states, logits and loss in fp32 and bf16 against float64 on the CPU"),
    "attention": Part(38, "the kernel of every attention, cuDNN's on and off, 20 new shapes, NaN in gradients"),
    "decoding": Part(50, "captured graphs, plain CUDA and CPU write the same ids; waits; tokens/s against the floor"),
    "zero": Part(120, "torchrun: ZeRO 1, 2, 3 in fp32 and bf16, resume, SIGTERM"),
    "training": Part(130, "a step of base and large: seconds, MFU, busy share, launches, waits; each switch"),
    "memory": Part(60, "peak memory of a step against a forecast"),
    "features": Part(30, "ViT-large: equal to the CPU's, pictures/s"),
    "loaders": Part(50, "0, 2, 4 loader processes: share of time waiting for data"),
    "hang": Part(22, "the hang guard ends a process whose GPU does not answer"),
}
FORECAST = "docs/data/memory.json"
RUNS_TO_ITS_END = "the part runs to its end"


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.list:
        for name, part in PARTS.items():
            print(f"{name:10} {part.seconds:4} s  {part.shows}")
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    if options.here:
        return run_here(options.here, options)
    results = []
    for name in options.parts or PARTS:
        results.append(run_in_process(name, options))
        print(told(results[-1], judged=not options.not_judged), flush=True)
    return print_summary(results, judged=not options.not_judged)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), metavar="PART", help="only these, see --list")
    parser.add_argument("--list", action="store_true", help="list the parts with their time limits")
    parser.add_argument("--size", choices=["full", "tiny"], default="full", help="tiny: to see that every part runs")
    parser.add_argument("--cpu", action="store_true", help="on the CPU, at the tiny size")
    parser.add_argument("--not-judged", action="store_true", help="values mean nothing here: a check may fail")
    parser.add_argument("--forecast", type=Path, help=f"JSON of expected peaks of memory, {FORECAST} if it exists")
    parser.add_argument("--time-factor", type=float, default=1.0, help="times the time limits, on a slow machine")
    parser.add_argument("--here", choices=list(PARTS), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not options.out and not options.list:
        parser.error("--out DIR is missing: the folder that the results are written to")
    if options.forecast is None and (ROOT / FORECAST).is_file():
        options.forecast = ROOT / FORECAST
    if options.forecast and not options.forecast.is_file():
        parser.error(f"--forecast {options.forecast} is no file; give a JSON of expected peaks, or leave it out")
    if options.cpu:
        options.size = "tiny"
    return options


def run_in_process(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run a part in a process of its own; returns what its JSON contains."""
    path, log = options.out / f"{name}.json", options.out / f"{name}.log"
    path.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--here", name, "--out", str(options.out), "--size", options.size]
    command += ["--forecast", str(options.forecast)] if options.forecast else []
    command += ["--not-judged"] if options.not_judged else []
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    if options.cpu:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    limit = PARTS[name].seconds * options.time_factor
    started = time.perf_counter()
    with open(log, "wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            process.wait(limit)
            trouble = f"it ended with status {process.returncode}" if process.returncode else None
        except subprocess.TimeoutExpired:
            trouble = f"it was ended after its limit of {limit:g} s"
            end_with_children(process)
    result = json.loads(path.read_text()) if path.exists() else {}
    if trouble and "error" not in result:
        tail = log.read_text(errors="replace")[-3000:]
        result |= {"error": f"{trouble}\n{tail}"}
        result["checks"] = {**result.get("checks", {}), RUNS_TO_ITS_END: False}
    result = {"part": name, **result, "seconds": round(time.perf_counter() - started, 1), "limit_s": limit}
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def end_with_children(process: subprocess.Popen) -> None:
    """Kill a process and all that it started: torchrun's ranks are in sessions of their own."""
    import psutil

    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    for child in family:
        try:
            child.kill()
        except psutil.Error:
            continue
    process.wait()


def run_here(name: str, options: argparse.Namespace) -> int:
    """Run a part in this process and write its JSON."""
    sys.modules.setdefault("mlflow", None)  # pyright: ignore[reportArgumentType], DeepSpeed imports it if it can
    from benchmarks.gpu_parts.machine import Proof, describe_machine

    proof = Proof(
        tiny=options.size == "tiny",
        folder=options.out / "work",
        results=options.out / f"{name}.json",
        judged=not options.not_judged,
        forecast=options.forecast,
    )
    status = 0
    try:
        part = getattr(importlib.import_module(f"benchmarks.gpu_parts.{name}"), name)
        result = part(proof)
    except Exception:
        kept = json.loads(proof.results.read_text()) if proof.results and proof.results.exists() else {}
        result = kept | {"error": traceback.format_exc()}
        result["checks"] = {**kept.get("checks", {}), RUNS_TO_ITS_END: False}
        traceback.print_exc()
        status = 1
    proof.keep({"machine": describe_machine(), **result})
    return status


def failed_checks(result: dict[str, Any]) -> list[str]:
    return [check for check, holds in result.get("checks", {}).items() if not holds]


def told(result: dict[str, Any], *, judged: bool) -> str:
    """The lines on a part that has ended."""
    wrong, checks = failed_checks(result), result.get("checks", {})
    lines = [f"{result['part']}: {result['seconds']} s, {len(checks) - len(wrong)} of {len(checks)} checks hold"]
    word = "FAILED" if judged else "not judged"
    lines += [f"  {'FAILED' if check == RUNS_TO_ITS_END else word}: {check}" for check in wrong]
    first, *others = result.get("error", "").strip().splitlines() or [""]
    lines += [f"    {line}" for line in (first, *others[-3:]) if line]
    return "\n".join(lines)


def print_summary(results: list[dict[str, Any]], *, judged: bool) -> int:
    """Print a table of the parts; returns the status of the program."""
    failed = [check for result in results for check in failed_checks(result) if judged or check == RUNS_TO_ITS_END]
    machine = next((result["machine"] for result in results if "machine" in result), {})
    print("\n" + ", ".join(f"{name} {value}" for name, value in machine.items()))
    for result in results:
        wrong, checks = len(failed_checks(result)), len(result.get("checks", {}))
        state = "error" if "error" in result else f"{checks - wrong}/{checks}"
        print(
            f"{result['part']:10} {result['seconds']:6.1f} of {result['limit_s']:4.0f} s  {state:>6}  "
            f"{result.get('headline', '')}"
        )
    total = sum(result["seconds"] for result in results)
    print(f"{total:.0f} s in all; " + (f"{len(failed)} checks FAILED" if failed else "no check failed"))
    return 1 if failed else 0


if __name__ == "__main__":
    # This file's folder has scripts with the names of libraries' modules.
    sys.path[:] = [str(ROOT), *(path for path in sys.path if path != str(ROOT / "benchmarks"))]
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # threads and NCCL's own end are not waited for
