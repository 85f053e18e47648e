"""What a program beside ours and the benchmark say to each other: a line of JSON each way, over the standard streams.

    python -m benchmarks.peers.ctranslate2 MODEL CONVERTED SOURCES

MODEL is a folder of transformers' T5, CONVERTED one for what is made of it, SOURCES a file
``{"sources": [[417, 9, 1], ...], "max_new_tokens": 256}``. The program answers ``{"engines": [...]}`` when it is ready,
then to each engine's name on a line ``{"processor_seconds": 8.2, "ids": [[5, 8, 1], ...]}``: all texts, each up to and
with its end token. It knows nothing else of ours, because our packages are not in its environment.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

END_TOKEN, PADDING = 1, 0
Ids = list[list[int]]
WriteBatch = Callable[[Ids], Ids]  # the texts of a batch of sources
Open = Callable[[Path, Path, int], dict[str, Callable[[Ids], Ids]]]  # MODEL, CONVERTED, max_new_tokens: the engines


def serve(open_engines: Open) -> None:
    """Open the engines that the command line asks for and write texts until the standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    model, converted, path = map(Path, sys.argv[1:])
    given = json.loads(path.read_text())
    engines = open_engines(model, converted, given["max_new_tokens"])

    def answer(content: dict) -> None:
        print(json.dumps(content), file=answers, flush=True)

    answer({"engines": list(engines)})
    for line in sys.stdin:
        started = time.process_time()
        ids = engines[line.strip()](given["sources"])
        seconds = time.process_time() - started
        answer({"processor_seconds": seconds, "ids": [until_end(row) for row in ids]})


def made_once(folder: Path, make: Callable[[Path], object]) -> Path:
    """A folder that is made whole, or not at all, where it does not exist yet."""
    if not folder.exists():
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        make(unfinished)
        unfinished.rename(folder)
    return folder


def by_length(write: WriteBatch, batch_size: int) -> Callable[[Ids], Ids]:
    """Batches of sources of similar lengths, the longest first; texts in the order of the sources."""

    def write_all(sources: Ids) -> Ids:
        order = sorted(range(len(sources)), key=lambda index: -len(sources[index]))
        texts: dict[int, list[int]] = {}
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            texts |= dict(zip(chosen, write([sources[index] for index in chosen]), strict=True))
        return [texts[index] for index in range(len(sources))]

    return write_all


def with_generate(model, max_new_tokens: int) -> WriteBatch:
    """Greedy search by a model that has transformers' ``generate``."""
    import torch

    def write(sources: Ids) -> Ids:
        width = max(map(len, sources))
        ids_BS = torch.tensor([[*source, *[PADDING] * (width - len(source))] for source in sources])
        mask_BS = torch.tensor([[1] * len(source) + [0] * (width - len(source)) for source in sources])
        with torch.inference_mode():
            texts_BT = model.generate(
                input_ids=ids_BS,
                attention_mask=mask_BS,
                do_sample=False,
                num_beams=1,
                use_cache=True,
                max_new_tokens=max_new_tokens,
            )
        return [row[1:] for row in texts_BT.tolist()]  # behind the start token

    return write


def until_end(ids: Sequence[int]) -> list[int]:
    """A text up to and with its end token; all of it where it has none."""
    ids = list(ids)
    return ids[: ids.index(END_TOKEN) + 1] if END_TOKEN in ids else ids
