"""Costs of 64 nodes of 8 GPUs with ten million questions: measured constants, the rest computed or simulated.

    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/scale.py                # all sections
    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/scale.py plan network   # some of them

Sections: start, data, plan, shards, network, generation, checkpoints, files, mlflow.

Every line starts with M (measured on this machine, in processor time unless stated otherwise), A (assumed, see
``benchmarks/scale_model.py``) or D (derived from those, or simulated with a seed). docs/scale.md explains the lines.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scale_model import (
    BATCHES,
    EFFICIENCY,
    FEATURE_BYTES,
    GPUS,
    HOP_S,
    LINKS,
    MEASURED_BLOCKS,
    MEASURED_STEP_S,
    NFS_BYTES_S,
    NFS_OPERATIONS_S,
    NFS_ROUND_TRIP_S,
    NODES,
    NVLINK,
    PADDING,
    PEAK,
    QUESTIONS,
    RANKS,
    SHARD,
    SPEEDS,
    STORE_REQUESTS_S,
    Link,
    block_s,
    draw_lengths,
    simulate_queue,
    step_communication_s,
)

from data_shards.atomic_files import commit_json, sha256_of_file
from data_shards.generated_texts import Task, write_task
from data_shards.index import _SCHEMA, read_index, rows_of_extension
from data_shards.manifest import Shard, manifest_shards, read_manifest
from data_shards.plan import Plan
from data_shards.range_requests import plan_ranges
from data_shards.shard_cache import ShardCache
from data_shards.writer import write_manifest
from launcher.cluster.task_queue import TaskQueue

NUM_SHARDS = -(-QUESTIONS // SHARD)
NUM_TASKS = -(-QUESTIONS // 256)
WORDS = [
    "the",
    "magnets",
    "attract",
    "repel",
    "because",
    "poles",
    "solution",
    "north",
    "south",
    "energy",
    "light",
    "water",
    "plant",
    "animal",
    "force",
    "heat",
    "state",
    "liquid",
    "gas",
]


def report(kind: str, text: str) -> None:
    print(f"{kind}  {text}", flush=True)


def cpu_s(work: Callable[[], Any], repeats: int = 1) -> float:
    """Processor seconds of one call."""
    started = time.process_time()
    for _ in range(repeats):
        work()
    return (time.process_time() - started) / repeats


def make_plan(
    count: int = QUESTIONS,
    *,
    batch: int = BATCHES[0],
    micro: int = 4,
    window: int = 4,
    shard: int = SHARD,
    **others: Any,
) -> Plan:
    shards = (np.arange(count) // shard).astype(np.int32)
    return Plan(
        *draw_lengths(count),
        shards,
        seed=0,
        epoch=0,
        global_batch_size=batch,
        micro_batch_size=micro,
        window_shards=window,
        **others,
    )


def write_an_index(path: Path) -> None:
    random, names = np.random.default_rng(0), [f"question-{number:08d}" for number in range(SHARD)]
    columns = [
        names,
        ["json"] * SHARD,
        np.arange(SHARD) * 1536,
        np.full(SHARD, 900),
        random.integers(0, 2**32, SHARD, dtype=np.uint32),
    ]
    pq.write_table(pa.Table.from_pydict(dict(zip(_SCHEMA.names, columns, strict=True)), schema=_SCHEMA), path)


def measure_start(folder: Path) -> None:
    code = (
        "import time, sys, os; s = time.process_time(); import launcher.training.launch, launcher.training.loop, "
        "ray; print(time.process_time() - s);"
        "f = [m.__file__ for m in list(sys.modules.values()) if os.path.exists(getattr(m, '__file__', "
        "None) or '')]; print(len(f), sum(map(os.path.getsize, f)))"
    )
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    seconds, count, size = float(lines[-3]), int(lines[-2]), int(lines[-1])
    report(
        "M",
        f"imports of a rank: {seconds:.1f} s, {count:,} files, {size / 1e6:.0f} MB of them Python and extension "
        "modules",
    )
    report(
        "D",
        f"imports from NFS: {NODES * count:,} opens by {NODES} nodes, {NODES * count / NFS_OPERATIONS_S:.0f} s at "
        f"{NFS_OPERATIONS_S:,} operations/s if a node reads once, {RANKS * count / NFS_OPERATIONS_S:.0f} s if every "
        "rank does",
    )
    shards = [
        Shard(f"train-{number:06d}", "train", SHARD, 13_000_000, hashlib.sha256(bytes(number)).hexdigest())
        for number in range(NUM_SHARDS)
    ]
    write_manifest(folder / "text", "text", shards, {"counts": {}})
    size = (folder / "text" / "manifest.json").stat().st_size
    seconds = cpu_s(lambda: manifest_shards(read_manifest(folder / "text"), "train"))
    report("M", f"manifest of {NUM_SHARDS:,} shards: {size / 1e6:.1f} MB, read in {seconds:.2f} s")
    reads = RANKS * 4 * 2  # train and val of a rank, train of its two loader processes; text and features
    report(
        "D",
        f"remote folder: {reads:,} manifests fetched by {RANKS} ranks at a start (loader_processes 2), "
        f"{reads * size / 1e9:.0f} GB",
    )
    source, target = draw_lengths(QUESTIONS)
    path = folder / "lengths.npz"
    np.savez(path, source=source, target=target, source_cut=source, target_cut=target)
    from launcher.stages.token_lengths import read_lengths

    read_s = cpu_s(lambda: read_lengths(path, ("source", "target")))

    report(
        "M",
        f"lengths of {QUESTIONS:,} questions: {path.stat().st_size / 1e6:.0f} MB; a rank reads 80 MB in {read_s:.2f} s",
    )
    path.unlink()
    for name, parameters in count_parameters().items():
        report(
            "D",
            f"{name}: {parameters / 1e6:,.0f} M parameters; 8 ranks of a node hold {8 * 4 * parameters / 1e9:.0f} GB "
            f"of fp32 weights in main memory while they start (ZeRO-1, 2); {NODES} nodes read "
            f"{NODES * 4 * parameters / 1e9:,.0f} GB, {NODES * 4 * parameters / NFS_BYTES_S:.0f} s at "
            f"{NFS_BYTES_S / 1e9:.0f} GB/s",
        )


def count_parameters() -> dict[str, int]:
    import torch

    from mmcot.models.t5 import T5ForMultimodalGeneration

    counts = {}
    for name in ("base", "large", "xl"):
        with torch.device("meta"):
            model = T5ForMultimodalGeneration(_config(name))
        counts[name] = sum(parameter.numel() for parameter in model.parameters())
    return counts


def _config(name: str) -> Any:
    from launcher.config.loading import load_settings
    from mmcot.models.t5 import MultimodalT5Config

    shape = load_settings(preset=f"scienceqa-{name}").model.shape.for_config
    return MultimodalT5Config(**shape, vision_num_patches=145, vision_dim=1024)


def measure_data(folder: Path) -> None:
    from data_shards.sources.forms import read_questions
    from launcher.data.fingerprints import _pictures_fingerprint

    count, random = 10_000, np.random.default_rng(0)
    (folder / "images").mkdir()
    with open(folder / "questions.jsonl", "w", encoding="utf-8") as file:
        for number in range(count):
            (folder / "images" / f"{number}.png").touch()
            record = {
                "qid": str(number),
                "question": " ".join(random.choice(WORDS, 20)),
                "choices": ["attract", "repel"],
                "answer": "repel",
            }
            record |= {
                "context": " ".join(random.choice(WORDS, 40)),
                "image": f"images/{number}.png",
                "rationale": " ".join(random.choice(WORDS, 40)),
                "split": "train",
            }
            file.write(json.dumps(record) + "\n")
    seconds = cpu_s(lambda: read_questions(folder / "questions.jsonl")) / count
    tracemalloc.start()
    questions = read_questions(folder / "questions.jsonl")
    memory = tracemalloc.get_traced_memory()[0] / count
    tracemalloc.stop()
    del questions
    again = cpu_s(lambda: _pictures_fingerprint(folder / "questions.jsonl")) / count
    per_resume = QUESTIONS * (again + NFS_ROUND_TRIP_S)
    report(
        "M",
        f"reading questions: {seconds * 1e6:.0f} us and {memory / 1e3:.1f} kB a question; "
        f"fingerprinting pictures by size: {again * 1e6:.0f} us a question",
    )
    report(
        "D",
        f"ten million of them with data.path: {QUESTIONS * memory / 1e9:.0f} GB in the driver; "
        f"every start and every resume reads all and checks each picture: {QUESTIONS * again / 60:.0f} min of "
        f"processor, {per_resume / 3600:.1f} h with {NFS_ROUND_TRIP_S * 1e3:.1f} ms a check on NFS",
    )
    report("D", f"questions whose pictures a resume checks in a minute: {60 / (again + NFS_ROUND_TRIP_S):,.0f}")


def measure_plan(folder: Path) -> None:
    lengths, shards = draw_lengths(QUESTIONS), (np.arange(QUESTIONS) // SHARD).astype(np.int32)
    for batch in BATCHES:
        tracemalloc.start()
        started = time.process_time()
        plan = Plan(*lengths, shards, seed=0, epoch=0, global_batch_size=batch, micro_batch_size=4)
        seconds, (kept, peak) = time.process_time() - started, tracemalloc.get_traced_memory()
        tracemalloc.stop()
        dealing = cpu_s(lambda plan=plan: plan.local_blocks(7, rank=3, world_size=RANKS), 20)
        fingerprint_s = cpu_s(lambda plan=plan: plan.fingerprint)
        report(
            "M",
            f"plan, batch {batch:,}: {seconds:.1f} s, keeps {kept / 1e6:.0f} MB besides its arguments, "
            f"{peak / 1e6:.0f} MB at its peak; a rank's blocks of a step {dealing * 1e3:.1f} ms; "
            f"fingerprint {fingerprint_s:.1f} s",
        )
        rate = QUESTIONS / seconds / 10
        report(
            "D",
            f"a plan takes a tenth of an epoch at {rate:,.0f} questions/s, ranks of base in blocks of 4: "
            + ", ".join(f"{rate * block_s('base', speed) / 4:,.0f} ({speed})" for speed in SPEEDS),
        )
        del plan
    kept_mb = 80 + 40 + 80  # lengths, shard numbers, order
    report(
        "D",
        f"a node with 8 ranks and two loader processes each: 8 x (80 + 2 x {kept_mb}) MB = "
        f"{8 * (80 + 2 * kept_mb) / 1e3:.1f} GB of order and lengths; 24 processes plan at a start and {16} at every "
        "epoch",
    )
    for batch, micro, group in itertools.chain(
        itertools.product(BATCHES, (16, 8, 4, 2, 1), (True,)), ((2048, 4, False), (8192, 4, False))
    ):
        if batch // micro < RANKS:
            continue
        plan = make_plan(400_000, batch=batch, micro=micro, window=64, group_by_length=group)
        report(
            "D",
            f"batch {batch:,} in blocks of {micro}{'' if group else ' (random)'}, {batch // micro // RANKS} a rank: "
            f"busiest / mean rank of {RANKS} {plan.imbalance(RANKS, max_steps=30):.2f}, of 64 "
            f"{plan.imbalance(64, max_steps=30):.2f}; padding {plan.padding_factor():.2f}; in time, base with graphs, "
            f"{_imbalance_of_time(plan, RANKS):.2f} and {_imbalance_of_time(plan, 64):.2f}",
        )


def _imbalance_of_time(plan: Plan, world_size: int) -> float:
    """Seconds of the busiest rank over those of the mean rank, base with graphs."""
    busiest = mean = 0.0
    for step in range(min(plan.num_steps, 30)):
        blocks = plan.batch_blocks(step)
        indexes, _ = plan._deal(blocks, world_size)
        seconds = block_s("base", "with graphs", plan._costs(blocks))[indexes].sum(0)
        busiest, mean = busiest + seconds.max(), mean + seconds.mean()
    return busiest / mean


def measure_shards(folder: Path) -> None:
    write_an_index(folder / "an.parquet")
    index_bytes = (folder / "an.parquet").stat().st_size
    rows_of_extension(read_index(folder / "an.parquet"), "json")
    index_s = cpu_s(lambda: rows_of_extension(read_index(folder / "an.parquet"), "json"), 200)
    report("M", f"index of {SHARD} members: {index_bytes / 1e3:.1f} kB, opened in {index_s * 1e3:.2f} ms")
    random = np.random.default_rng(0)
    for batch, window, shard in ((2048, 4, 512), (2048, 64, 512), (2048, 8, 8192), (8192, 4, 512), (8192, 64, 512)):
        count = max(120 * batch, 3 * window * shard)
        plan = make_plan(count, batch=batch, window=window, shard=shard)
        text_sizes = np.clip(random.lognormal(np.log(850), 0.4, count), 300, 8000).astype(np.int64)
        by_rank, by_node, steps, requests, needed = 0, 0, 0, 0, 0
        windows = [list(group) for _, group in itertools.groupby(range(plan.num_steps - 1), plan.window_of_step)][1:-1]
        for group in windows:
            of_rank = [
                np.concatenate(
                    [b for s in group for _, b in plan.local_blocks(s, rank=r, world_size=RANKS) if b is not None]
                )
                for r in (0, *range(1, GPUS))
            ]
            by_rank += len(np.unique(plan.shard_of_sample[of_rank[0]]))
            by_node += len(np.unique(plan.shard_of_sample[np.concatenate(of_rank)]))
            steps += len(group)
            needed += len(of_rank[0])
            requests += _requests(of_rank[0], shard, text_sizes)
        shards_read = len(windows) * window * plan.num_samples / (-(-plan.num_samples // shard) * shard)
        per_sample, epoch_steps = needed / steps, QUESTIONS / batch
        opened = by_rank / steps * epoch_steps * 2
        report(
            "D",
            f"batch {batch:,}, windows of {window} shards of {shard}: a window is {steps / len(windows):.1f} steps; "
            f"a rank opens {by_rank / len(windows):.1f} of its shards, a node {by_node / len(windows):.1f} "
            f"({min(1.0, by_node / shards_read):.0%}); per rank and step {per_sample:.1f} questions, "
            f"{2 * per_sample:.1f} preads, {2 * by_rank / steps:.1f} indexes "
            f"({2 * by_rank / steps * index_s * 1e3 * shard / SHARD:.1f} ms); "
            f"requests {requests / steps:.1f} ({requests / needed:.2f} a question); "
            f"all ranks {RANKS * requests / steps:,.0f} requests a step",
        )
        index_gb = RANKS * opened * index_bytes * shard / SHARD / 1e9
        report(
            "D",
            f"   an epoch of {epoch_steps:,.0f} steps: {RANKS * opened:,.0f} index opens ({index_gb:.0f} GB), "
            f"{2 * QUESTIONS:,} preads; a step's requests take {RANKS * requests / steps / STORE_REQUESTS_S:.1f} s "
            f"at {STORE_REQUESTS_S:,}/s",
        )
    for name, size in FEATURE_BYTES.items():
        whole = QUESTIONS * (size + 900 + 1500) / 1e9
        report(
            "D",
            f"features {name}: {size / 1e3:.0f} kB a question, {whole:,.0f} GB in all; "
            f"a node needs {whole / NODES:,.0f} GB an epoch; with whole shards it fetches up to {whole:,.0f} GB, "
            f"{NODES} nodes {NODES * whole / 1e3:,.0f} TB, {whole * 1e9 / 50e9 / 0.8 / 60:.1f} min an epoch at 400 "
            f"Gb/s a node, {whole * 1e9 / 3.125e9 / 0.8 / 3600:.1f} h at 25",
        )
    _measure_cache(folder)


def _requests(samples: np.ndarray, shard: int, text_sizes: np.ndarray) -> int:
    """Ranges that a rank requests in a window, by the real planner, text and vit features."""
    samples = np.unique(samples)
    strides = 512 + -(-text_sizes // 512) * 512
    starts = np.concatenate([[0], np.cumsum(strides)[:-1]])
    size = FEATURE_BYTES["vit"]
    offsets = np.concatenate([starts[samples], (samples % shard) * (512 + -(-size // 512) * 512)])
    files = np.concatenate([2 * (samples // shard), 2 * (samples // shard) + 1])
    return len(plan_ranges(files, offsets, np.concatenate([text_sizes[samples], np.full(len(samples), size)]))[0])


def _measure_cache(folder: Path) -> None:
    cache, seconds = ShardCache(folder / "cache", max_bytes=1 << 60), {}
    cache.folder.mkdir(parents=True)
    for count in (1000, 5000):
        for number in range(count):
            (cache.folder / f"{hashlib.sha256(str(number).encode()).hexdigest()}.tar").touch()
        seconds[count] = cpu_s(lambda: cache._make_room(1), 3)
    per_file = seconds[5000] / 5000
    kept = 50e9 / (SHARD * (FEATURE_BYTES["patch"] + 2400) / 2)
    whole = 2 * NUM_SHARDS
    report(
        "M",
        f"making room in a cache of 1,000 / 5,000 shards: {seconds[1000] * 1e3:.0f} / {seconds[5000] * 1e3:.0f} ms, "
        "under a lock, twice a fetch",
    )
    report(
        "D",
        f"filling a cache that holds all {whole:,} tars: {2 * per_file * whole * whole / 2 / 3600:.1f} h of listing; "
        f"with cache_gb 50 and patch features ({kept:,.0f} tars) {2 * per_file * kept * whole / 60:.0f} min an "
        f"epoch; listing takes a minute of filling at {int((60 / per_file) ** 0.5):,} tars",
    )


def measure_network(folder: Path) -> None:
    from mmcot.models.flops import BACKWARD_AND_FORWARD, forward_flops

    report(
        "A",
        f"links {', '.join(LINKS)}; NVLink {NVLINK / 1e9:.0f} GB/s; {EFFICIENCY:.0%} of a link; "
        f"{HOP_S['network'] * 1e6:.0f} us a hop; bf16, ZeRO-1; a step of {MEASURED_BLOCKS} blocks takes as long as "
        f"measured on an H200, by tokens of a block: {MEASURED_STEP_S}; blocks of 4 as long as the smallest measured; "
        "xl without graphs as long as large, with graphs as much longer as it has operations; all ranks compute "
        "equally long",
    )
    source, target = draw_lengths(20_000)
    for name, parameters in count_parameters().items():
        flops = BACKWARD_AND_FORWARD * forward_flops(_config(name), source, target, num_patches=145) / len(source)
        report("D", f"{name}: {flops / 1e9:.0f} GFLOP a question and training step")
        for speed in SPEEDS:
            taken = block_s(name, speed)
            _report_rank(name, speed, flops, float((source + target).mean()))
            for link_name, link in LINKS.items():
                report("D", f"   {speed}, {link_name}: {_share_of_network(parameters, taken, link)}")
            _report_limits(parameters, taken, speed)


def _report_rank(name: str, speed: str, flops: float, tokens: float) -> None:
    """What a rank that only computes reads and reaches, by the rows of its blocks."""
    cells = []
    for rows in (4, 16):
        taken = block_s(name, speed, rows * tokens * PADDING)
        rate = rows / taken
        cells.append(
            f"blocks of {rows}, {taken * 1e3:.1f} ms: {rate:.0f} questions/s, {flops * rate / PEAK:.2%} of "
            f"{PEAK / 1e12:.0f} TFLOP/s; "
            f"{NFS_BYTES_S / FEATURE_BYTES['vit'] / rate:,.0f} ranks use up {NFS_BYTES_S / 1e9:.0f} GB/s, "
            f"{STORE_REQUESTS_S / 1.8 / rate:,.0f} use up {STORE_REQUESTS_S:,} requests/s"
        )
    report("D", f"   {speed}: {'; '.join(cells)}")


def _share_of_network(parameters: int, taken: float, link: Link) -> str:
    """Compute and network of a step of 512 ranks in blocks of 4, and what it asks of storage."""
    cells = []
    for batch in BATCHES:
        steps = batch // 4 // RANKS
        compute = steps * taken
        network = step_communication_s(parameters, ranks=RANKS, link=link)
        zero_2 = step_communication_s(parameters, ranks=RANKS, link=link, reductions=steps)
        rate = batch / (compute + network)
        cells.append(
            f"batch {batch:,} ({steps} micro-steps): compute {compute * 1e3:,.0f} ms, network {network * 1e3:,.0f} "
            f"(ZeRO-2 {zero_2 * 1e3:,.0f}), computing {compute / (compute + network):.1%} of the time; "
            f"{rate:,.0f} questions/s, {rate * FEATURE_BYTES['vit'] / 1e9:.1f} GB/s of vit features, an epoch in "
            f"{QUESTIONS / rate / 60:.1f} min"
        )
    return "; ".join(cells)


def _report_limits(parameters: int, taken: float, speed: str) -> None:
    for link_name, link in LINKS.items():
        fits = [
            ranks
            for ranks in (8, 16, 32, 64, 128, 256, 512)
            if taken >= step_communication_s(parameters, ranks=ranks, link=link)
        ]
        report(
            "D",
            f"   {speed}, {link_name}, one block a rank: the network takes half of a step beyond "
            + ("no number up to 512" if RANKS in fits else f"{max(fits, default='fewer than 8')} ranks"),
        )


def measure_generation(folder: Path) -> None:
    lines = [
        {
            "qid": f"q{n:08d}",
            "rationale": " ".join(np.random.default_rng(n).choice(WORDS, 42)),
            "num_tokens": 53,
            "finish": "eos",
        }
        for n in range(256)
    ]
    from launcher.generation.generation_worker import describe_file

    task = Task("train", "train-000000", 0, 256)
    path = write_task(folder, task, lines)
    describe_s = cpu_s(lambda: describe_file(path, task, "rationale"), 20)
    write_an_index(folder / "an.parquet")
    index_s = cpu_s(lambda: rows_of_extension(read_index(folder / "an.parquet"), "json"), 100)
    costs = {
        Task("train", f"train-{n // 2:06d}", 256 * (n % 2), 256): float(n * 7919 % 10_007) for n in range(NUM_TASKS)
    }
    queues: list[TaskQueue] = []
    build_s = cpu_s(lambda: queues.append(TaskQueue(costs, max_attempts=3)))
    take_s = cpu_s(lambda: [queues[0].take() for _ in range(NUM_TASKS)]) / NUM_TASKS
    (folder / "train").mkdir(exist_ok=True)
    for number in range(10_000):
        (folder / "train" / f"{number}.jsonl").touch()
    stat_s = cpu_s(lambda: [(folder / "train" / f"{number}.jsonl").exists() for number in range(10_000)]) / 10_000
    driver_s = _measure_driver()
    report(
        "M",
        f"{NUM_TASKS:,} tasks: queue made in {build_s:.2f} s, a take {take_s * 1e6:.1f} us; "
        f"whether a file exists {stat_s * 1e6:.0f} us; a shard's sizes {index_s * 1e3:.2f} ms; "
        f"counting a finished file {describe_s * 1e3:.1f} ms",
    )
    report(
        "M",
        f"driver, {RANKS} calls outstanding, a task: {driver_s['cpu'] * 1e3:.2f} ms of processor, "
        f"{driver_s['wall'] * 1e3:.2f} ms of wall time (nice 19, with other work on the machine)",
    )
    report(
        "D",
        f"before the first task: {NUM_SHARDS:,} indexes {NUM_SHARDS * index_s:.0f} s + "
        f"{NUM_SHARDS * 2 * NFS_ROUND_TRIP_S:.0f} s of NFS, {2 * NUM_TASKS:,} existence checks "
        f"{2 * NUM_TASKS * (stat_s + NFS_ROUND_TRIP_S):.0f} s; counting and hashing finished files, "
        f"by their workers: {NUM_TASKS * describe_s:.0f} s + {NUM_TASKS * 3 * NFS_ROUND_TRIP_S:.0f} s of NFS, "
        "shared among them",
    )
    _, target = draw_lengths(NUM_TASKS * 256)
    source, _ = draw_lengths(NUM_TASKS * 256, seed=1)
    topic = np.repeat(np.random.default_rng(2).lognormal(0, 0.4, NUM_TASKS // 2 + 1), 2)[
        :NUM_TASKS
    ]  # a shard's own length
    tokens, sizes = target.reshape(NUM_TASKS, 256).sum(1) * topic, source.reshape(NUM_TASKS, 256).sum(1) * topic
    for rate in (1_000, 5_000, 20_000):
        seconds = tokens / rate * np.random.default_rng(3).lognormal(0, 0.1, NUM_TASKS)
        for workers in (RANKS, 4 * RANKS):
            found = simulate_queue(sizes, seconds, workers=workers, dispatch_s=driver_s["wall"])
            before = NUM_SHARDS * (index_s + 2 * NFS_ROUND_TRIP_S) + 2 * NUM_TASKS * (stat_s + NFS_ROUND_TRIP_S)
            report(
                "D",
                f"{workers:,} workers of {rate:,} tokens/s, tasks of {seconds.mean():.1f} s ({seconds.min():.1f} to "
                f"{seconds.max():.1f}): {found['total_s'] / 60:.1f} min, busy {found['busy']:.1%}, "
                f"driver {found['driver_busy']:.0%} busy, {found['tail_s']:.1f} s from the first idle worker to the "
                "end; with the driver's work before the first task "
                f"{found['busy'] * found['total_s'] / (found['total_s'] + before):.0%} busy",
            )


class _Stub:
    def run(self, task: Any) -> Any:
        from launcher.generation.generation_worker import TaskDone

        return TaskDone(
            {
                "num_samples": 256,
                "num_tokens": 13_000,
                "num_truncated": 0,
                "num_empty": 0,
                "num_repetitive": 0,
                "sha256": "0" * 64,
            },
            1.0,
            0.001,
        )


def _measure_driver() -> dict[str, float]:
    """The loop of ``launcher/cluster/worker_pool.py`` with as many calls outstanding as there are ranks."""
    import ray

    with contextlib.suppress(Exception):
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}},
        )
    workers = [ray.remote(_Stub).options(num_cpus=0).remote() for _ in range(2)]
    task, running = Task("train", "train-000000", 0, 256), {}
    ray.get([worker.run.remote(task) for worker in workers])
    for number in range(RANKS):
        running[workers[number % 2].run.remote(task)] = workers[number % 2]
    started, wall, rounds = time.process_time(), time.perf_counter(), 2_000
    for _ in range(rounds):
        (finished, *_), _ = ray.wait([*running], num_returns=1)
        worker = running.pop(finished)
        ray.get(finished)
        running[worker.run.remote(task)] = worker
    found = {"cpu": (time.process_time() - started) / rounds, "wall": (time.perf_counter() - wall) / rounds}
    ray.shutdown()
    return found


def measure_checkpoints(folder: Path) -> None:
    path = folder / "blob"
    path.write_bytes(np.random.default_rng(0).bytes(256 << 20))
    sha256_of_file(path)
    rate = (256 << 20) / cpu_s(lambda: sha256_of_file(path), 2)
    path.unlink()
    small = folder / "state"
    small.mkdir()
    for number in range(1025):
        (small / f"{number}").write_bytes(b"x")
    listing = cpu_s(lambda: sorted(str(p.relative_to(small)) for p in small.rglob("*") if p.is_file()))
    files = {
        f"zero_pp_rank_{n}_mp_rank_00_optim_states.pt": {"size_bytes": 10**8, "sha256": "0" * 64} for n in range(1025)
    }
    manifest = cpu_s(lambda: commit_json(folder / "manifest.json", {"files": files}))
    report(
        "M",
        f"sha256 {rate / 1e6:,.0f} MB/s of one core; listing 1,025 files {listing * 1e3:.0f} ms; "
        f"a manifest of them {manifest * 1e3:.0f} ms, {(folder / 'manifest.json').stat().st_size / 1e3:.0f} kB",
    )
    for name, parameters in count_parameters().items():
        for stage, precision in ((2, "bf16"), (3, "bf16"), (2, "fp32")):
            weights, number = (
                parameters * (2 if precision == "bf16" else 4),
                RANKS * (2 if stage == 3 else 1) + (stage < 3),
            )
            state = 12 * parameters + weights * (stage < 3)
            largest = weights if stage < 3 else 12 * parameters / RANKS
            hashing = (largest + 12 * parameters / RANKS) / rate
            resume = NODES * weights * (stage < 3) + state
            report(
                "D",
                f"{name}, ZeRO-{stage}, {precision}: {number:,} files, {state / 1e9:.1f} GB, written "
                f"{state / NFS_BYTES_S:.1f} s and read again to hash {state / NFS_BYTES_S:.1f} s at "
                f"{NFS_BYTES_S / 1e9:.0f} GB/s; the busiest rank hashes {hashing:.1f} s, rank 0 opens all to fsync "
                f"{number * 2 * NFS_ROUND_TRIP_S:.1f} s; a resume reads {state / 1e9:.0f} GB to verify and "
                f"{resume / 1e9:,.0f} GB to load, {(state + resume) / NFS_BYTES_S:.0f} s; "
                f"another world size, one process: {4 * 12 * parameters / 1e9:.0f} GB through it, "
                f"{4 * 12 * parameters / 1e9:.0f} s at 1 GB/s",
            )


def measure_files(folder: Path) -> None:
    from launcher.runs.journal import Journal, JournalReader
    from launcher.runs.run_dir import RunDir
    from launcher.runs.sample_ledger import Ledger

    point = {f"metric_{n}": 0.123456789 * n for n in range(25)}
    journal = Journal(folder / "j.jsonl")
    append = cpu_s(lambda: journal.log(7, point), 5_000)
    journal.close()
    read = cpu_s(lambda: list(JournalReader(folder / "j.jsonl").read())) / 5_000
    commit_json(folder / "lock.json", {"attempt": 1})
    check = cpu_s(lambda: RunDir(folder).stop_requested(1), 2_000)
    beat = cpu_s(lambda: commit_json(folder / "lock.json", {"attempt": 1}), 50)
    ledger = Ledger(folder / "ledger.jsonl", 4883)
    record = cpu_s(lambda: ledger.record(7, [(3, ["q00000001"] * 4)]), 5_000)
    line = (folder / "ledger.jsonl").stat().st_size / 5_000
    report(
        "M",
        f"journal of 25 metrics: append {append * 1e6:.0f} us, read {read * 1e6:.0f} us, "
        f"{(folder / 'j.jsonl').stat().st_size / 5_000:.0f} bytes; a check for stop.json {check * 1e6:.0f} us; "
        f"a committed JSON {beat * 1e3:.2f} ms; a ledger line {record * 1e6:.0f} us, {line:.0f} bytes",
    )
    report(
        "D",
        f"checks for stop.json: {RANKS} a second, {RANKS / NFS_OPERATIONS_S:.1%} of an NFS server; "
        f"lock.json every 5 s for any number of ranks; ledger: {RANKS} files, "
        f"{RANKS * line * QUESTIONS / BATCHES[0] / 1e9:.1f} GB an epoch, {RANKS * 10:,} appends a second at ten "
        "steps/s",
    )


def measure_mlflow(folder: Path) -> None:
    from launcher.runs.journal import Journal, LineFile
    from launcher.runs.run_dir import PARENT, RunDir
    from launcher.tracking.mlflow_sync import MlflowSync
    from launcher.tracking.run_log import RunLog

    names = [f"cpu_{n}" for n in range(7)] + [f"gpu_{n // 2}_{n % 2}" for n in range(16)]
    run_dir, steps = RunDir(folder / "runs" / "scale"), ["train-rationale", "rationales", "train-answer", "evaluate"]
    file = LineFile(run_dir.tracking)
    log = RunLog(file, PARENT, run_dir.path)
    sync = MlflowSync(run_dir, uri=f"sqlite:///{folder / 'runs' / 'mlflow.db'}", experiment="scale")
    with log.running(name="scale", tags={}):
        for step in steps:
            log.follow(f"{step}-system-*.jsonl")
        sync.send()

        def write(step: str, points: int, first: int) -> None:
            for node in range(NODES):
                with contextlib.closing(Journal(run_dir.logs / f"{step}-system-node-{node:02d}.jsonl")) as journal:
                    for number in range(points):
                        journal.log(first + number, {f"system/node-{node:02d}/{name}": 0.5 for name in names})

        write(steps[0], 5, 0)
        first = cpu_s(sync.send) / (5 * NODES * len(names))
        write(steps[0], 5, 10)
        again = cpu_s(sync.send) / (5 * NODES * len(names))
        for step in steps[1:]:
            write(step, 1, 100)
        sync.send()
        idle = cpu_s(sync.send, 10)
        tracemalloc.start()
        sent = set()
        for path in run_dir.logs.glob("*-system-*.jsonl"):
            for line in path.read_text(encoding="utf-8").splitlines():
                sent |= {(key, json.loads(line)["step"]) for key in json.loads(line)["metrics"]}
        memory = tracemalloc.get_traced_memory()[0] / len(sent)
        tracemalloc.stop()
        started, wall = time.process_time(), time.perf_counter()
        restarted = MlflowSync(run_dir, uri=f"sqlite:///{folder / 'runs' / 'mlflow.db'}", experiment="scale")
        write(steps[0], 1, 200)
        restarted.send()
        restart_s, restart_wall_s = time.process_time() - started, time.perf_counter() - wall
        log.follow("one-metrics.jsonl")
        with contextlib.closing(Journal(run_dir.logs / "one-metrics.jsonl")) as journal:
            for number in range(4500):
                journal.log(number, {"one": 0.5})
        restarted.send()
        run_id = restarted._state["runs"][PARENT]
        history = cpu_s(lambda: restarted._client.get_metric_history(run_id, "one")) / 4500
    file.close()
    keys = NODES * len(names)
    rate = keys / 10 + 2.5
    report(
        "M",
        f"SQLite, batches of 900: {900 * first * 1e3:.0f} ms a batch at first, {900 * again * 1e3:.0f} ms when the "
        f"keys are known, client and database together; a send with nothing new and {4 * NODES} files "
        f"{idle * 1e3:.0f} ms; a point sent is kept as {memory:.0f} bytes; a restarted driver: "
        f"{restart_s:.1f} s ({restart_wall_s:.1f} s of wall time) for {keys:,} keys of about ten points; "
        f"a point is read back in {history * 1e6:.0f} us",
    )
    report(
        "D",
        f"{NODES} machines of {len(names)} metrics every 10 s and rank 0: {rate:.0f} points/s, {rate * again:.0%} of "
        f"a core; one core sends {1 / again:,.0f} points/s, {1 / again * 10 / len(names):,.0f} machines",
    )
    report(
        "D",
        f"a day: {keys * 8640 / 1e6:.1f} million points, {keys * 8640 * memory / 1e9:.1f} GB in the driver, "
        f"{keys * 8640 * history / 60:.0f} min to read back after a restart; a check of {4 * NODES} files every 2 s: "
        f"{4 * NODES / 2:.0f} opens/s; {idle / 2:.0%} of a core",
    )


SECTIONS = {
    "start": measure_start,
    "data": measure_data,
    "plan": measure_plan,
    "shards": measure_shards,
    "network": measure_network,
    "generation": measure_generation,
    "checkpoints": measure_checkpoints,
    "files": measure_files,
    "mlflow": measure_mlflow,
}

if __name__ == "__main__":
    logging.disable(logging.WARNING)
    for name in sys.argv[1:] or SECTIONS:
        started = time.process_time()
        print(f"\n[{name}]")
        with tempfile.TemporaryDirectory(prefix="scale-") as folder:
            SECTIONS[name](Path(folder))
        print(f"   ({time.process_time() - started:.0f} s of processor time)")
