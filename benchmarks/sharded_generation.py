"""Cost of assigning tasks: two Ray workers compared with two bare processes, and 256 workers in simulation.

    PYTHONPATH=. python benchmarks/sharded_generation.py RUN [--rounds 3]       # RUN: a finished run
    PYTHONPATH=. python benchmarks/sharded_generation.py --simulate DATA_SET

RUN: its stage-one model writes the validation and test rationales again, alternately through the queue and Ray workers
and in two processes that take every second task. Compared are tokens over the workers' time between ready and their
last task, and the part of it spent between tasks.

--simulate runs the same queue on a virtual clock: 100,000 tasks of 256 questions drawn from the data
set's real questions, a shard of one topic each, so that tasks differ; time is proportional to the
words of the real explanations, and the queue knows only the questions' bytes. The driver assigns one task
at a time. Printed is the busy part of all workers until 2% of the time is left, and over all of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import heapq
import json
import multiprocessing
import statistics
import tempfile
from pathlib import Path

import numpy as np
import yaml

from data_shards.generated_texts import list_tasks
from data_shards.sources.forms import read_questions
from launcher.cluster.gpus import with_device
from launcher.cluster.task_queue import TaskQueue
from launcher.config.loading import parse_settings
from launcher.generation.text_tasks import GenerationWorker, Progress, run_tasks
from launcher.runs.run_dir import RunDir, shards_dir_of
from launcher.stages.jobs import GenerationJob

SPLITS = ("val", "test")


def make_job(run: Path, output_dir: str) -> GenerationJob:
    settings = parse_settings(yaml.safe_load((run / "run.yaml").read_text(encoding="utf-8")))
    settings = settings.model_copy(update={"generation": settings.generation.model_copy(update={"task_samples": 64})})
    run_dir = RunDir(run)
    settings = with_device(settings, run_dir, print, keep=False)
    shards = (run.parent.parent / shards_dir_of(run_dir)).absolute()
    return GenerationJob("rationale", settings, str(run_dir.model("rationale").absolute()), str(shards), output_dir)


def _bare(job: GenerationJob, tasks: list, ready, results) -> None:
    worker = GenerationWorker(job)
    ready.wait()
    results.put([worker.run(task) for task in tasks])


def in_processes(job: GenerationJob, tasks: list) -> Progress:
    context = multiprocessing.get_context("spawn")
    ready, results = context.Barrier(2), context.Queue()
    processes = [context.Process(target=_bare, args=(job, tasks[rank::2], ready, results)) for rank in range(2)]
    for process in processes:
        process.start()
    done = [task for _ in processes for task in results.get()]
    for process in processes:
        process.join()
    return Progress(
        0, 0, sum(t.file["num_tokens"] for t in done), 0.0, sum(t.busy_s for t in done), sum(t.waited_s for t in done)
    )


def in_ray(job: GenerationJob, tasks: list) -> Progress:
    last: list[Progress] = []
    run_tasks(job, tasks, report=lambda progress: last.append(dataclasses.replace(progress)))
    return last[-1]


def measure(run: Path, rounds: int) -> None:
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    ratios, shares = [], []
    for number in range(rounds):
        rates = {}
        for name, engine in (("bare processes", in_processes), ("Ray workers", in_ray)):
            with tempfile.TemporaryDirectory() as folder:
                job = make_job(run, folder)
                done = engine(job, list_tasks(job.local_shards_dir(), SPLITS, task_samples=64))
            rates[name] = 2 * done.num_tokens / (done.busy_s + done.waited_s)
            print(
                f"round {number} {name:<15} {rates[name]:7.0f} tokens/s, {done.waiting_share:.2%} of the time "
                "between tasks",
                flush=True,
            )
        ratios.append(rates["Ray workers"] / rates["bare processes"])
        shares.append(done.waiting_share)
    print(
        f"Ray workers / bare processes: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}); "
        f"between tasks {statistics.median(shares):.2%}"
    )
    ray.shutdown()


def draw_tasks(data: Path, num_tasks: int, chance: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The known bytes and the needed words of each task."""
    by_topic: dict[str, list[tuple[int, int]]] = {}
    for problem in read_questions(data).problems["train"]:
        size = len(json.dumps(problem.to_record()))
        by_topic.setdefault(problem.topic, []).append((size, 2 + len(problem.solution.split())))
    topics = [np.array(pairs) for pairs in by_topic.values()]
    weights = np.array([len(pairs) for pairs in topics]) / sum(map(len, topics))
    drawn = [chance.choice(topics[t], size=256) for t in chance.choice(len(topics), size=num_tasks, p=weights)]
    return np.array([d[:, 0].sum() for d in drawn]), np.array([d[:, 1].sum() for d in drawn])


def simulate(data: Path, *, num_workers: int, num_tasks: int, dispatch_s: float, words_per_s: float) -> None:
    chance = np.random.default_rng(0)
    costs, words = draw_tasks(data, num_tasks, chance)
    seconds = words / words_per_s * chance.lognormal(0.0, 0.1, num_tasks)  # 10% between two runs of a task
    orders = {
        "longest first": {number: float(cost) for number, cost in enumerate(costs)},
        "in data order": dict.fromkeys(range(num_tasks), 0.0),
    }
    print(
        f"{num_tasks:,} tasks of {seconds.mean():.1f} s ({seconds.min():.1f} to {seconds.max():.1f}), "
        f"{num_workers} workers, {1000 * dispatch_s:.1f} ms to assign a task"
    )
    for name, known in orders.items():
        queue, driver_free, spans = TaskQueue(known, max_attempts=1), 0.0, []
        free = [(0.0, worker) for worker in range(num_workers)]
        heapq.heapify(free)
        while (task := queue.take()) is not None:
            since, worker = heapq.heappop(free)
            driver_free = max(driver_free, since) + dispatch_s
            end = driver_free + seconds[task]
            spans.append((driver_free, end))
            heapq.heappush(free, (end, worker))
        spans, total = np.array(spans), max(end for end, _ in free)
        until = 0.98 * total
        busy = (np.minimum(spans[:, 1], until) - np.minimum(spans[:, 0], until)).sum() / (num_workers * until)
        whole = (spans[:, 1] - spans[:, 0]).sum() / (num_workers * total)
        tail = total - np.partition(spans[:, 1], -num_workers)[-num_workers]
        print(
            f"  {name:<14} {total / 3600:.2f} h, busy {busy:.2%} until the last 2%, {whole:.2%} over all; "
            f"the last task ends {tail:.0f} s after the first idle worker"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("path", type=Path)
    parser.add_argument("--simulate", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=256)
    parser.add_argument("--tasks", type=int, default=100_000)
    parser.add_argument("--dispatch-s", type=float, default=0.003, help="driver's time for a task; measured, see docs")
    parser.add_argument("--words-per-s", type=float, default=400.0, help="of one worker")
    arguments = parser.parse_args()
    if arguments.simulate:
        simulate(
            arguments.path,
            num_workers=arguments.workers,
            num_tasks=arguments.tasks,
            dispatch_s=arguments.dispatch_s,
            words_per_s=arguments.words_per_s,
        )
    else:
        measure(arguments.path, arguments.rounds)
