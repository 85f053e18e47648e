"""Our stream compared with plain webdataset on the same tars, and the cost of remote reading.

    python benchmarks/stream.py [DATA_SET] [--rounds 7] [--samples 4096] [--many 32768] [--out DIR]

1. Samples a processor-second of one process that reads, decodes and stacks text and features [100, 256] in batches
   of 8: ours in the shuffled order of the plan, webdataset in the order of the tars (its fastest); then with
   the prompts tokenized as well. Interleaved; median and spread of the ratios.
2. Bytes read over bytes needed at world sizes 1, 2 and 8, each rank simulated in turn with an S3 server on
   this machine.
3. Peak memory of a walk over a few and over many shards.

``stream.json`` has all numbers. DATA_SET: see ``results.data_set``.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import logging
import multiprocessing
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import webdataset as wds
from results import data_set, ratios, spread, summary, write_results

from data_shards.mirror import mirror_folder
from data_shards.plan import Plan
from data_shards.reader import SplitReader
from data_shards.shard_files import RemoteAccess
from data_shards.sources.forms import read_questions
from data_shards.sources.question_set import QuestionSet
from data_shards.stream import walk_steps
from data_shards.writer import write_feature_shards, write_text_shards
from launcher.stages.samples import StageSamples
from mmcot.texts.encoding import collate, encode_pair
from mmcot.texts.prompts import build_pair
from mmcot.texts.sample import Sample
from mmcot.texts.tokenizer import train_tokenizer

SHAPE, BATCH = (100, 256), 8


def build(source: Path, folder: Path, num_samples: int) -> None:
    """Write a data folder of ``num_samples`` training questions: ``source`` repeated, every second with features."""
    problems = read_questions(source).problems["train"]
    repeated = [dataclasses.replace(problems[n % len(problems)], qid=f"q{n}") for n in range(num_samples)]
    write_text_shards(
        QuestionSet({"train": repeated, "val": [], "test": []}, lambda problem: []), folder, samples_per_shard=512
    )
    random = np.random.default_rng(0)

    def features_of(problem: Sample, counts: dict) -> np.ndarray:
        return random.standard_normal(SHAPE if int(problem.qid[1:]) % 2 else (0, SHAPE[1])).astype(np.float16)

    write_feature_shards(folder, name="random", features_of=features_of, shape=SHAPE)


def plan_of(reader: SplitReader, global_batch_size: int = BATCH) -> Plan:
    ones = np.ones(len(reader), np.int32)
    return Plan(
        ones,
        ones,
        reader.shard_of_sample,
        seed=0,
        epoch=0,
        global_batch_size=global_batch_size,
        micro_batch_size=min(BATCH, global_batch_size),
    )


class Raw:
    """Reads and stacks, without prompts."""

    is_remote = False

    def __init__(self, reader: SplitReader) -> None:
        self.reader = reader
        self.is_remote = reader.is_remote

    def __getattr__(self, name: str):
        return getattr(self.reader, name)

    def load_block(self, samples: np.ndarray, is_dummy: bool, epoch: int):
        """Problems and stacked features of a block's samples."""
        problems = [self.reader.problem(sample) for sample in samples]
        return problems, stack([self.reader.features(sample) for sample in samples])


def stack(arrays: list[np.ndarray]) -> torch.Tensor:
    """Stack arrays into float16 [B, 100, 256], zeros where there are no features."""
    stacked = torch.zeros((len(arrays), *SHAPE), dtype=torch.float16)
    for row, array in zip(stacked, arrays, strict=True):
        row[: len(array)] = torch.tensor(array)
    return stacked


def ours(folder: Path, tokenizer) -> float:
    reader = SplitReader(folder, "train", features="random")
    samples = (
        Raw(reader)
        if tokenizer is None
        else StageSamples(
            reader, tokenizer, format="QCM-E", use_caption=False, max_source_tokens=512, max_target_tokens=512
        )
    )
    plan = plan_of(reader)
    started = time.process_time()
    for _ in walk_steps(lambda epoch: plan, samples, rank=0, world_size=1, steps=range(plan.num_steps)):
        pass
    return len(reader) / (time.process_time() - started)


def theirs(folder: Path, tokenizer) -> float:
    tars = sorted((folder / "text").glob("*.tar"))
    text = wds.WebDataset([str(tar) for tar in tars], shardshuffle=False)
    features = wds.WebDataset([str(folder / "features" / "random" / tar.name) for tar in tars], shardshuffle=False)
    started, number, rows = time.process_time(), 0, []

    def finish() -> None:
        if tokenizer is None:
            stack([array for _, array in rows])
        else:
            problems = [Sample.from_record(record) for record, _ in rows]
            pairs = [
                encode_pair(tokenizer, *build_pair(p, "QCM-E"), max_source_tokens=512, max_target_tokens=512)
                for p in problems
            ]
            collate(pairs, [array for _, array in rows], feature_shape=SHAPE, pad_token_id=0)
        rows.clear()

    for sample, feature in zip(text, features, strict=True):
        rows.append((json.loads(sample["json"]), np.load(io.BytesIO(feature["npy"]), allow_pickle=False)))
        number += 1
        if len(rows) == BATCH:
            finish()
    return number / (time.process_time() - started)


def throughput(folder: Path, tokenizer, name: str, rounds: int) -> dict:
    """Alternate between ours and webdataset; print and return samples a second and their ratios."""
    rates: dict[str, list[float]] = {"ours": [], "webdataset": []}
    for _ in range(rounds):
        rates["ours"].append(ours(folder, tokenizer))
        rates["webdataset"].append(theirs(folder, tokenizer))
    found = {reader: {"samples_per_processor_second": summary(values)} for reader, values in rates.items()}
    found["ours"]["ratio"] = ratios(rates["ours"], rates["webdataset"])
    print(
        f"{name:<28} ours {found['ours']['samples_per_processor_second']['median']:8,.0f} webdataset "
        f"{found['webdataset']['samples_per_processor_second']['median']:8,.0f} a processor-second, "
        f"ratio {spread(found['ours']['ratio'])} over {rounds}",
        flush=True,
    )
    return found


def remote_bytes(folder: Path) -> list[dict]:
    """Bytes read by ranges from an S3 server and bytes needed, by the number of ranks."""
    found = []
    import s3fs
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request otherwise
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ.update(
        AWS_ACCESS_KEY_ID="testing", AWS_SECRET_ACCESS_KEY="testing", AWS_ENDPOINT_URL=f"http://{host}:{port}"
    )
    filesystem = s3fs.S3FileSystem()
    filesystem.mkdir("bucket")
    filesystem.put(f"{folder}/", "bucket/data/", recursive=True)
    for world_size in (1, 2, 8):
        with tempfile.TemporaryDirectory() as cache:
            read = needed = requests = 0
            for rank in range(world_size):
                reader = SplitReader(
                    mirror_folder("s3://bucket/data", cache, features="random"),
                    "train",
                    features="random",
                    access=RemoteAccess("ranges", cache),
                )
                plan = plan_of(reader, global_batch_size=64)
                for _ in walk_steps(
                    lambda epoch, plan=plan: plan,
                    Raw(reader),
                    rank=rank,
                    world_size=world_size,
                    steps=range(plan.num_steps),
                ):
                    pass
                read, needed, requests = (
                    read + reader.bytes_read,
                    needed + reader.bytes_needed,
                    requests + reader.num_requests,
                )
                reader.close()
            print(
                f"ranges, {world_size} ranks: {read / 1e6:,.0f} MB read, {needed / 1e6:,.0f} MB needed, "
                f"ratio {read / needed:.3f}, {requests:,} requests",
                flush=True,
            )
            found.append({"ranks": world_size, "bytes_read": read, "bytes_needed": needed, "requests": requests})
    server.stop()
    return found


def _peak(folder: Path, queue) -> None:
    ours(folder, None)
    status = Path("/proc/self/status").read_text()  # getrusage would include the parent's peak
    queue.put(int(status.split("VmHWM:")[1].split()[0]) / 1e3)


def peak_memory(folder: Path) -> float:
    """Peak of a fresh process that walks over an epoch, in MB."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_peak, args=(folder, queue))
    process.start()
    peak = queue.get()
    process.join()
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="?")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--samples", type=int, default=4_096)
    parser.add_argument("--many", type=int, default=32_768, help="samples of the walk whose memory is compared")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with data_set(options.data) as (source, data_name), tempfile.TemporaryDirectory() as name:
        small, large = Path(name) / "small", Path(name) / "large"
        build(source, small, options.samples)
        build(source, large, options.many)
        pairs = (text for problem in read_questions(source).problems["train"] for text in build_pair(problem, "QCM-E"))
        tokenizer = train_tokenizer(pairs, Path(name) / "tokenizer", vocab_size=8000)
        report: dict = {"data": data_name, "samples": options.samples, "many": options.many, "features": SHAPE}
        report["throughput"] = {
            "read, decode and stack": throughput(small, None, "read, decode and stack", options.rounds),
            "with prompts, tokenized": throughput(small, tokenizer, "with prompts, tokenized", options.rounds),
        }
        report["ranges"] = remote_bytes(small)
        report["peak_memory_mb"] = {str(options.samples): peak_memory(small), str(options.many): peak_memory(large)}
        print(
            "peak memory of a walk: " + ", ".join(f"{v:,.0f} MB over {k}" for k, v in report["peak_memory_mb"].items())
        )
    write_results(options.out, "stream", report)


if __name__ == "__main__":
    main()
