"""Our training step beside other loops over the same texts: real tokens a processor-second, losses compared first.

    OMP_NUM_THREADS=1 python benchmarks/training.py [DATA_SET] [--steps 4] [--rounds 3] [--stages 0 1 2] [--out DIR]
    OMP_NUM_THREADS=1 python benchmarks/training.py --ranks 2 [...]

A T5 of the small size with fusion, ViT-shaped features, batches of 8 questions in blocks of 4, fused AdamW, clipping;
one thread, one process, rounds interleaved. First the losses of the loops over the same blocks: 50 steps of a tiny
model, then the first and all steps of this one. The Trainer is given the same questions in its own orders. Batches
stand for an epoch of each order (every n-th by padded tokens). With ``--ranks 2`` two processes over gloo.
``training.json`` (``training-2.json`` with two ranks) has all numbers. DATA_SET: see ``results.data_set``.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
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

BARE, DEEPSPEED = "bare loop, fused AdamW", "bare DeepSpeed, ZeRO-2"
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
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if options.ranks > 1 and "RANK" not in os.environ:
        sys.exit(start_ranks(options.ranks))
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    with data_set(options.data) as (path, name), tempfile.TemporaryDirectory() as folder:
        questions = read_pairs(path, Path(folder))
        say(f"{name}, {len(questions.pairs)} questions, {questions.real_tokens:,} real tokens")
        shape = TINY if options.tiny else SMALL
        measured = {"data": name, "questions": len(questions.pairs), "real_tokens": questions.real_tokens}
        measured |= {"batch": BATCH, "block": BLOCK, "threads": torch.get_num_threads(), "shape": shape}
        if options.ranks > 1:
            numbers = compare_ranks(questions, options, shape)
        else:
            numbers = compare_loops(questions, options, shape, Path(folder))
    if int(os.environ.get("RANK", 0)) == 0:
        write_results(options.out, "training" if options.ranks == 1 else "training-2", measured | numbers)


def say(text: str) -> None:
    """Print a line, on rank 0."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(text, flush=True)


def compare_loops(questions: Questions, options: argparse.Namespace, shape: dict, folder: Path) -> dict[str, Any]:
    """Checks and rates of all loops in one process."""
    # The Trainer is made first: where a process group exists it would wrap the model for several ranks.
    theirs = TransformersLoop(shape, questions, folder)
    orders = {name: trainer_order(questions, grouped) for name, (grouped, _) in PADDINGS.items()}
    checks: dict[str, Any] = {"trainer": check_trainer(theirs, orders, questions)}
    join_group()
    epoch = planned_order(questions)
    checks["tiny_model"] = check_losses(
        {name: build(TINY)(steps_of(questions, epoch[:CHECKED_STEPS]))[1] for name, build in makers(options).items()},
        "tiny model",
    )
    steps = steps_of(questions, typical(questions, epoch, options.steps))
    loops = {name: build(shape) for name, build in makers(options).items()}
    checks["this_model"] = check_losses({name: loop(steps)[1] for name, loop in loops.items()}, "this model")
    runs: dict[str, Callable[[], float]] = {name: lambda loop=loop: loop(steps)[0] for name, loop in loops.items()}
    sizes = dict.fromkeys(loops, (options.steps, 0, epoch))
    for name, (_, pad_to) in PADDINGS.items():
        number = 1 if pad_to else options.steps  # all batches padded to 512 take the same time
        chosen = typical(questions, orders[name], number)
        runs[name] = lambda chosen=chosen, pad_to=pad_to: theirs.seconds(chosen, pad_to)
        sizes[name] = (number, pad_to, orders[name])
    theirs.seconds(typical(questions, orders["Trainer, dynamic padding"], 1), 0)  # its first step makes Adam's state
    seconds = interleaved(runs, options.rounds)
    return {"checks": checks, "steps": options.steps, "loops": rates(seconds, sizes, questions)}


def makers(options: argparse.Namespace) -> dict[str, Callable[[dict], Loop]]:
    """The loops over the same blocks, by name."""
    found: dict[str, Callable[[dict], Loop]] = {BARE: bare_loop, DEEPSPEED: deepspeed_loop}
    for stage in options.stages:
        found[f"ours, ZeRO-{stage}"] = lambda shape, stage=stage: our_loop(shape, stage)
    return found


def check_trainer(theirs: TransformersLoop, orders: dict[str, list[Order]], questions: Questions) -> dict[str, Any]:
    """The Trainer's epochs have every question once, and its loss of a block is ours."""
    for name, epoch in orders.items():
        numbers = sorted(int(number) for batch in epoch for block in batch for number in block)
        if numbers != list(range(len(questions.pairs))):
            raise SystemExit(f"{name}: an epoch has not each of the {len(questions.pairs)} questions once")
    trainer_loss, our_loss = theirs.losses_of_one_block(orders["Trainer, dynamic padding"][0])
    difference = abs(trainer_loss - our_loss) / our_loss
    say(f"Trainer: every question once an epoch; loss of a block {trainer_loss:.6f}, ours differs by {difference:.1e}")
    if difference > CHECKED_LOSS:
        raise SystemExit(f"the Trainer's loss of a block is {trainer_loss}, ours {our_loss}: not the same computation")
    return {"questions_once": True, "loss_of_a_block": trainer_loss, "relative_difference": difference}


def check_losses(losses: dict[str, list[float]], what: str) -> dict[str, Any]:
    """Relative differences to the bare loop's losses; a loop that computes something else ends the program."""
    base, found = losses[BARE], {}
    for name, values in losses.items():
        differences = [abs(a - b) / b for a, b in zip(values, base, strict=True)]
        found[name] = {"first_step": differences[0], "all_steps": max(differences), "steps": len(values)}
        say(f"{what}: {name:<26} losses differ by {differences[0]:.1e} (step 1), {max(differences):.1e} ({len(base)})")
        if differences[0] > FIRST_STEP or max(differences) > ALL_STEPS:
            raise SystemExit(f"{name}: expected at most {FIRST_STEP} (step 1), {ALL_STEPS} (all); it is not compared")
    return found


def interleaved(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Processor-seconds of each, round by round."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        for name, run in runs.items():
            seconds[name].append(run())
        say(f"round {number + 1} of {rounds}")
    return seconds


def rates(
    seconds: dict[str, list[float]], sizes: Mapping[str, tuple[int, int, list[Order]]], questions: Questions
) -> dict[str, Any]:
    """Real tokens a processor-second of each loop, and ratios to the bare loop, round by round.

    An epoch's real tokens are the same for all; its mean batch has 1 / (number of batches) of them.
    """
    per_step = {name: [value / sizes[name][0] for value in values] for name, values in seconds.items()}
    tokens = questions.real_tokens / (len(questions.pairs) / BATCH)
    found = {}
    for name, values in per_step.items():
        _, pad_to, epoch = sizes[name]
        padded = sum(questions.padded_tokens(batch, pad_to=pad_to) for batch in epoch)
        found[name] = {
            "seconds_per_step": summary(values),
            "tokens_per_processor_second": tokens / statistics.median(values),
            "of_bare_loop": ratios(per_step[BARE], values),
            "padded_over_real": padded / questions.real_tokens,
        }
        say(
            f"{name:<36}{tokens / statistics.median(values):7.0f} tokens a processor-second, of the bare loop "
            f"{spread(found[name]['of_bare_loop'], '.3f')}, {statistics.median(values):.2f} s a step"
        )
    return found


def compare_ranks(questions: Questions, options: argparse.Namespace, shape: dict) -> dict[str, Any]:
    """The bare loop with one all-reduce beside ours, on the ranks of this group: processor-seconds of all, and time."""
    join_group()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    batches = typical(questions, planned_order(questions), options.steps)
    steps = share(steps_of(questions, batches), rank=rank, world_size=world_size)
    loops = {BARE: bare_loop(shape, world_size)}
    loops |= {f"ours, ZeRO-{stage}": our_loop(shape, stage, world_size) for stage in options.stages}
    checks = {"this_model": check_losses({name: loop(steps)[1] for name, loop in loops.items()}, "two ranks")}
    processor: dict[str, list[float]] = {name: [] for name in loops}
    wall: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(options.rounds):
        for name, loop in loops.items():
            own, elapsed = timed_together(loop, steps)
            processor[name].append(own / options.steps)
            wall[name].append(elapsed / options.steps)
    found = {}
    for name in loops:
        found[name] = {
            "processor_seconds_per_step": summary(processor[name]),
            "seconds_per_step": summary(wall[name]),
            "of_bare_loop": ratios(processor[BARE], processor[name]),
            "of_bare_loop_by_time": ratios(wall[BARE], wall[name]),
        }
        by_processor, by_time = (spread(found[name][key]) for key in ("of_bare_loop", "of_bare_loop_by_time"))
        say(
            f"{name:<26}{statistics.median(wall[name]):.2f} s a step, of the bare loop {by_processor} by processor "
            f"time, {by_time} by time"
        )
    return {"checks": checks, "steps": options.steps, "ranks": world_size, "loops": found}


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


def start_ranks(number: int) -> int:
    """Run this command once for each rank; the largest exit status of all."""
    group = {"WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen([sys.executable, *sys.argv], env={**os.environ, **group, "RANK": str(rank), "LOCAL_RANK": "0"})
        for rank in range(number)
    ]
    return max(process.wait() for process in processes)


if __name__ == "__main__":
    main()
