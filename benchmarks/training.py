"""Our training step beside other loops over the same texts: real tokens a processor-second, losses compared first.

    OMP_NUM_THREADS=1 python benchmarks/training.py [DATA_SET] [--steps 4] [--rounds 3] [--stages 0 1 2] [--out DIR]
    OMP_NUM_THREADS=1 python benchmarks/training.py --ranks 2 [...]

A T5 of the small size with fusion, ViT-shaped features, batches of 8 questions in blocks of 4, fused AdamW, clipping;
one thread, one process. Each loop is alone with the bare loop in a process of its own, so that memory is that of two
models (some 4 GB), and takes turns with it. First their losses over the same blocks: 50 steps of a tiny model, then
the first and all steps of this one. The Trainer is given the same questions in its own orders. Batches stand for an
epoch of each order (every n-th by padded tokens, of the epoch's mean size). With ``--ranks 2`` two processes over
gloo. ``training.json`` (``training-2.json`` with two ranks) has all numbers. DATA_SET: see ``results.data_set``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from results import data_set, ratios, spread, summary, write_results
from training_loops import (
    BATCH,
    BLOCK,
    LONGEST,
    SMALL,
    TINY,
    Loop,
    Order,
    Questions,
    TransformersLoop,
    bare_loop,
    deepspeed_loop,
    our_loop,
    planned_order,
    read_pairs,
    share,
    steps_of,
    trainer_order,
    typical,
)

from data_shards.stream import Step
from launcher.training.deepspeed_engine import init_distributed

BUDGET = 1024  # tokens of a block
BARE, DEEPSPEED, OURS = "bare loop, fused AdamW", "bare DeepSpeed, ZeRO-2", "ours, ZeRO-"
FIRST_STEP, ALL_STEPS = 1e-6, 1e-5  # relative differences of losses
CHECKED_STEPS, CHECKED_LOSS = 50, 1e-5
PADDINGS = {  # of the Trainer: grouped by, padded to
    "Trainer, padded to 512": (None, LONGEST),
    "Trainer, dynamic padding": (None, 0),
    "Trainer, grouped by source length": ("source", 0),
    "Trainer, grouped by source + target": ("source and target", 0),
}


def main() -> None:
    """Check that the loops compute the same, then time them; two ranks are two processes of this program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="?")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ranks", type=int, choices=[1, 2], default=1)
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the program")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--of-rank", type=Path, help=argparse.SUPPRESS)  # the file of a rank's numbers
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(threads := int(os.environ.get("OMP_NUM_THREADS", 1)))
    with data_set(options.data) as (path, name), tempfile.TemporaryDirectory() as folder:
        questions = read_pairs(path, Path(folder))
        say(f"{name}, {len(questions.pairs)} questions, {questions.real_tokens:,} real tokens")
        shape = TINY if options.tiny else SMALL
        if options.of_rank:
            return compare_ranks(questions, options, shape)
        measured = {"data": name, "questions": len(questions.pairs), "real_tokens": questions.real_tokens}
        measured |= {"batch": BATCH, "block": BLOCK, "threads": threads, "steps": options.steps, "shape": shape}
        if options.ranks > 1:
            measured |= start_ranks(options, path, Path(folder) / "rank.json")
        else:
            measured |= compare_loops(questions, options, shape)
    write_results(options.out, "training" if options.ranks == 1 else f"training-{options.ranks}", measured)


def say(text: str) -> None:
    """Print a line, on rank 0."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(text, flush=True)


def compare_loops(questions: Questions, options: argparse.Namespace, shape: dict) -> dict[str, Any]:
    """Checks and rates of all loops, each beside the bare loop."""
    checks: dict[str, Any] = {"tiny_model": {}, "this_model": {}}
    loops: dict[str, Any] = {}
    names = [DEEPSPEED, *(f"{OURS}{stage}" for stage in options.stages)]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
        for name in names:
            found, seconds = pool.submit(beside_bare, name, questions, options.steps, options.rounds, shape).result()
            for size, differences in found.items():
                checks[size][name] = differences
            loops |= rates(seconds, {}, questions)
        seconds, sizes = pool.submit(budget_beside_bare, questions, options.steps, options.rounds, shape).result()
        loops |= rates(seconds, sizes, questions)
        checks["trainer"], seconds, sizes = pool.submit(
            trainer_beside_bare, questions, options.steps, options.rounds, shape
        ).result()
        loops |= rates(seconds, sizes, questions)
    return {"checks": checks, "loops": loops}


def beside_bare(
    name: str, questions: Questions, number: int, rounds: int, shape: dict
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Differences of the losses of a loop to the bare loop's, and processor-seconds a step of both."""
    torch.set_num_threads(1)
    join_group()
    epoch = planned_order(questions)
    some = steps_of(questions, epoch[:CHECKED_STEPS])
    checks = {"tiny_model": check_losses(name, bare_loop(TINY)(some)[1], loop_named(name, TINY)(some)[1])}
    steps = steps_of(questions, typical(questions, epoch, number))
    bare, loop = bare_loop(shape), loop_named(name, shape)
    checks["this_model"] = check_losses(name, bare(steps)[1], loop(steps)[1])
    runs = {BARE: lambda: bare(steps)[0] / number, name: lambda: loop(steps)[0] / number}
    return checks, interleaved(runs, rounds)


def budget_beside_bare(
    questions: Questions, number: int, rounds: int, shape: dict
) -> tuple[dict[str, list[float]], dict[str, tuple[int, list[Order]]]]:
    """Processor-seconds a step of ours with blocks by tokens and of the bare loop, and the epoch of these blocks."""
    torch.set_num_threads(1)
    join_group()
    name, epoch = f"{OURS}0, blocks of {BUDGET:,} tokens", planned_order(questions, BUDGET)
    check_once(name, epoch, questions)
    chosen = [steps_of(questions, typical(questions, order, number)) for order in (planned_order(questions), epoch)]
    bare, ours = bare_loop(shape), our_loop(shape, 0)
    bare(chosen[0][:1])  # the first steps make Adam's state
    ours(chosen[1][:1])
    runs = {BARE: lambda: bare(chosen[0])[0] / number, name: lambda: ours(chosen[1])[0] / number}
    return interleaved(runs, rounds), {name: (0, epoch)}


def trainer_beside_bare(
    questions: Questions, number: int, rounds: int, shape: dict
) -> tuple[dict[str, Any], dict[str, list[float]], dict[str, tuple[int, list[Order]]]]:
    """The check of the Trainer, processor-seconds a step of its paddings and of the bare loop, and its epochs."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    sizes = {name: (pad_to, trainer_order(questions, grouped)) for name, (grouped, pad_to) in PADDINGS.items()}
    with tempfile.TemporaryDirectory() as folder:
        theirs, bare = TransformersLoop(shape, questions, Path(folder)), bare_loop(shape)
        checks = check_trainer(theirs, {name: epoch for name, (_, epoch) in sizes.items()}, questions)
        steps = steps_of(questions, typical(questions, planned_order(questions), number))
        runs: dict[str, Callable[[], float]] = {BARE: lambda: bare(steps)[0] / number}
        for name, (pad_to, epoch) in sizes.items():
            chosen = typical(questions, epoch, 1 if pad_to else number)  # padded to 512 all take the same time
            runs[name] = lambda chosen=chosen, pad_to=pad_to: theirs.seconds(chosen, pad_to) / len(chosen)
        bare(steps[:1])  # the first steps make Adam's state
        theirs.seconds(typical(questions, sizes["Trainer, dynamic padding"][1], 1), 0)
        return checks, interleaved(runs, rounds), sizes


def loop_named(name: str, shape: dict, world_size: int = 1) -> Loop:
    """Bare DeepSpeed, or ours at the ZeRO stage that the name ends with."""
    return deepspeed_loop(shape) if name == DEEPSPEED else our_loop(shape, int(name[-1]), world_size)


def check_trainer(theirs: TransformersLoop, orders: dict[str, list[Order]], questions: Questions) -> dict[str, Any]:
    """The Trainer's epochs have every question once, and its loss of a block is ours."""
    for name, epoch in orders.items():
        check_once(name, epoch, questions)
    trainer_loss, our_loss = theirs.losses_of_one_block(orders["Trainer, dynamic padding"][0])
    difference = abs(trainer_loss - our_loss) / our_loss
    say(f"Trainer: every question once an epoch; loss of a block {trainer_loss:.6f}, ours differs by {difference:.1e}")
    if difference > CHECKED_LOSS:
        raise SystemExit(f"the Trainer's loss of a block is {trainer_loss}, ours {our_loss}: not the same computation")
    return {"questions_once": True, "loss_of_a_block": trainer_loss, "relative_difference": difference}


def check_once(name: str, epoch: list[Order], questions: Questions) -> None:
    """End the program where an epoch has not each question once."""
    numbers = sorted(int(number) for batch in epoch for block in batch for number in block)
    if numbers != list(range(len(questions.pairs))):
        raise SystemExit(f"{name}: an epoch has not each of the {len(questions.pairs)} questions once")


def check_losses(name: str, base: list[float], losses: list[float]) -> dict[str, Any]:
    """Relative differences to the bare loop's losses; a loop that computes something else ends the program."""
    differences = [abs(a - b) / b for a, b in zip(losses, base, strict=True)]
    say(f"{name}: losses differ by {differences[0]:.1e} at the first step, {max(differences):.1e} over {len(base)}")
    if differences[0] > FIRST_STEP or max(differences) > ALL_STEPS:
        raise SystemExit(f"{name}: expected at most {FIRST_STEP} (first step), {ALL_STEPS} (all); it is not compared")
    return {"first_step": differences[0], "all_steps": max(differences), "steps": len(base)}


def interleaved(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Processor-seconds of each, round by round."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        for name, run in runs.items():
            seconds[name].append(run())
        say(f"round {number + 1} of {rounds}")
    return seconds


def rates(
    seconds: dict[str, list[float]], sizes: dict[str, tuple[int, list[Order]]], questions: Questions
) -> dict[str, Any]:
    """Real tokens a processor-second of loops by their seconds a step, and ratios to the bare loop, round by round.

    An epoch's real tokens are the same for all; its mean batch has 1 / (number of batches) of them.
    """
    tokens, found = questions.real_tokens / (len(questions.pairs) / BATCH), {}
    for name, values in seconds.items():
        pad_to, epoch = sizes.get(name) or (0, planned_order(questions))
        padded = sum(questions.padded_tokens(batch, pad_to=pad_to) for batch in epoch)
        found[name] = {
            "seconds_per_step": summary(values),
            "tokens_per_processor_second": tokens / statistics.median(values),
            "of_bare_loop": ratios(seconds[BARE], values),
            "padded_over_real": padded / questions.real_tokens,
        }
        say(
            f"{name:<36}{tokens / statistics.median(values):7.0f} tokens a processor-second, of the bare loop "
            f"{spread(found[name]['of_bare_loop'], '.3f')}, {statistics.median(values):.2f} s a step"
        )
    return found


def compare_ranks(questions: Questions, options: argparse.Namespace, shape: dict) -> None:
    """The bare loop with one all-reduce beside ours, on the ranks of this group; rank 0 writes the numbers."""
    join_group()
    rank, world_size, number = dist.get_rank(), dist.get_world_size(), options.steps
    steps = steps_of(questions, typical(questions, planned_order(questions), number))
    steps = share(steps, rank=rank, world_size=world_size)
    (stage,) = options.stages
    name = f"{OURS}{stage}"
    loops = {BARE: bare_loop(shape, world_size), name: our_loop(shape, stage, world_size)}
    losses = {each: loop(steps)[1] for each, loop in loops.items()}
    checks = {"this_model": {name: check_losses(name, losses[BARE], losses[name])}}
    processor: dict[str, list[float]] = {each: [] for each in loops}
    wall: dict[str, list[float]] = {each: [] for each in loops}
    for _ in range(options.rounds):
        for each, loop in loops.items():
            own, elapsed = timed_together(loop, steps)
            processor[each].append(own / number)
            wall[each].append(elapsed / number)
    found = {
        each: {
            "processor_seconds_per_step": summary(processor[each]),
            "seconds_per_step": summary(wall[each]),
            "of_bare_loop": ratios(processor[BARE], processor[each]),
            "of_bare_loop_by_time": ratios(wall[BARE], wall[each]),
        }
        for each in loops
    }
    by_processor, by_time = (spread(found[name][key]) for key in ("of_bare_loop", "of_bare_loop_by_time"))
    say(f"{name}: of the bare loop {by_processor} by processor time, {by_time} by time")
    if rank == 0:
        options.of_rank.write_text(json.dumps({"checks": checks, "loops": found}))


def timed_together(loop: Loop, steps: Sequence[Step]) -> tuple[float, float]:
    """Processor-seconds of all ranks together, and seconds until the last has ended."""
    dist.barrier()
    started = time.perf_counter()
    own, _ = loop(steps)
    total = torch.tensor([own], dtype=torch.float64)
    dist.all_reduce(total)
    return total.item(), time.perf_counter() - started


def join_group() -> None:
    """The group of this process's rank; one rank where no launcher has set any."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", str(free_port()))
    init_distributed(use_gpu=False)


def free_port() -> int:
    """A port that no program listens to."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start_ranks(options: argparse.Namespace, data: Path, file: Path) -> dict[str, Any]:
    """Run this program once for each rank, stage by stage; the numbers of all stages."""
    checks, loops = {}, {}
    for stage in options.stages:
        command = [sys.executable, __file__, str(data), "--stages", str(stage), "--of-rank", str(file)]
        command += ["--steps", str(options.steps), "--rounds", str(options.rounds), *["--tiny"] * options.tiny]
        group = {"WORLD_SIZE": str(options.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        processes = [
            subprocess.Popen(command, env={**os.environ, **group, "RANK": str(rank), "LOCAL_RANK": "0"})
            for rank in range(options.ranks)
        ]
        while any(process.poll() is None for process in processes) and not any(p.returncode for p in processes):
            time.sleep(0.2)
        if any(process.returncode for process in processes):
            for process in processes:
                process.kill()  # else it would wait for the one that failed
            raise SystemExit(f"{OURS}{stage}: a rank failed, its message is above")
        found = json.loads(file.read_text())
        checks |= found["checks"]["this_model"]
        loops |= found["loops"]
    return {"checks": {"this_model": checks}, "ranks": options.ranks, "loops": loops}


if __name__ == "__main__":
    main()
