"""Speed of text generation beside other programs, each in an environment of its own.

    python benchmarks/generation.py [DATA_SET] [--questions 128] [--rounds 3] [--peers NAME...] [--out DIR]

The model has T5-small's size and is trained for some minutes on short pairs of the data set, so that it writes words
and ends its texts (``generation_model.py``; stored for the next time). Every engine writes a text for every question,
greedily, to its end token or 256 tokens, on one thread and with a cache of keys and values. Rounds alternate between
the engines; printed are tokens per CPU-second (wall time depends on other processes of the machine), those of the
engine's own texts, and the ratios to transformers' ``generate`` round by round: median, lowest, highest.

Sources are sorted by length, which is faster in every engine; transformers is measured in data order too, as it is
usually called. The texts are compared with those that ``generate`` writes for one source at a time.

Rivals (``peers/``) are installed on the first run; one that cannot be is named with the reason and left out.
``generation.json`` has all numbers. DATA_SET: see ``results.data_set``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from generation_engines import BASE, margin, open_theirs, own_engines, reference_texts, transformers_engines
from generation_model import MAX_NEW_TOKENS, encode, trained_model
from generation_peers import TITLES, open_peers
from generation_rounds import Ids, compare, equality, in_rounds
from generation_sharing import sharing
from peers.environments import names, requirements
from results import data_set, write_results

from data_shards.sources.forms import read_questions
from mmcot.texts.prompts import build_pair


def main(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    with data_set(arguments.data) as (arguments.data, data_name):
        texts = [build_pair(problem, "QCM-E") for problem in read_questions(arguments.data).problems["train"]]
        folder = trained_model(texts, arguments.steps, arguments.model)
        sources = [list(pair.source_ids) for pair in encode(texts, folder)][-arguments.questions :]
        if arguments.memory:
            print(own_peak(folder, sources))
            return
        report: dict[str, Any] = {"data": data_name, "questions": len(sources)}
        report |= beside_others(folder, sources, arguments.peers, arguments.rounds)
        report["sharing"] = sharing(folder, sources, arguments.rounds)
        report["no_cache_padded_to_512"] = without_cache(folder, sources[:4])
        report["peak_memory_gb"] = {
            str(number): peak_memory(arguments, folder, number) for number in (32, len(texts)) if number <= len(texts)
        }
        write_results(arguments.out, "generation", report)


def beside_others(folder: Path, sources: Ids, peers: Sequence[str], rounds: int) -> dict[str, Any]:
    """All engines in turns, the texts of each compared with the reference, and what was left out."""
    theirs, left_out = open_theirs(folder), {}
    reference = reference_texts(theirs, sources)
    described = describe(sources, reference)
    with open_peers(peers, folder, sources, MAX_NEW_TOKENS, left_out) as others:
        engines = transformers_engines(theirs, sources) | others | own_engines(folder, sources)
        written = in_rounds(engines, rounds, left_out)

    def margin_at(index: int, place: int) -> float:
        return margin(theirs, sources[index], reference[index][:place])

    found = compare(written, BASE)
    for engine, numbers in found.items():
        numbers |= equality(reference, written[engine], margin_at)
        print(f"{engine}: {numbers['equal_texts']} of {len(sources)} texts equal, {numbers['differ_at'] or 'all'}")
    versions = {TITLES.get(name, name): requirements(name) for name in peers}
    measured = {title: packages for title, packages in versions.items() if title not in left_out}
    return described | {"engines": found, "peers": measured, "left_out": left_out}


def describe(sources: Ids, reference: Ids) -> dict[str, Any]:
    """Counts of the reference texts.

    Raises:
        SystemExit: the model repeats itself, so that its texts stand for nothing.
    """
    distinct = float(np.mean([len(set(ids)) / len(ids) for ids in reference]))
    found = {
        "source_tokens": sum(map(len, sources)),
        "tokens": sum(map(len, reference)),
        "longest": max(map(len, reference)),
        "ended": sum(ids[-1] == 1 for ids in reference),
        "distinct_tokens": distinct,
        "different_texts": len(set(map(tuple, reference))),
    }
    print(f"texts of generate, one at a time: {found}", flush=True)
    if distinct <= 0.25:
        raise SystemExit(
            f"{distinct:.0%} of a text's tokens are distinct, expected more than 25%: the model only repeats; "
            "train longer (--steps)"
        )
    return found


def without_cache(folder: Path, sources: Ids) -> dict[str, Any]:
    """``generate`` of a few sources padded to 512 and without a cache, as the published system calls it."""
    ids_BS = torch.tensor([[*source, *[0] * (512 - len(source))] for source in sources])
    model, started = open_theirs(folder), time.process_time()
    with torch.inference_mode():
        texts = model.generate(
            input_ids=ids_BS,
            attention_mask=(ids_BS != 0).long(),
            do_sample=False,
            num_beams=1,
            use_cache=False,
            max_new_tokens=MAX_NEW_TOKENS,
        )
    rate = (texts[:, 1:] != 0).sum().item() / (time.process_time() - started)
    print(f"no cache, padded to 512: {rate:.1f} tokens/s ({len(sources)} sources, once)", flush=True)
    return {"tokens_per_processor_second": rate, "sources": len(sources)}


def own_peak(folder: Path, sources: Ids) -> float:
    """GB that this process had at most when one engine, fp32 and 32 rows, has written all texts.

    By the system's VmHWM; ``getrusage`` counts what the process had that started this one.
    """
    (write,) = own_engines(folder, sources, dtypes=["fp32"], numbers_of_rows=[32]).values()
    write()
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e9


def peak_memory(arguments: argparse.Namespace, folder: Path, questions: int) -> float:
    """GB of a fresh process that writes this many texts."""
    command = [sys.executable, __file__, str(arguments.data), "--memory"]
    command += ["--model", str(folder), "--questions", str(questions)]
    gb = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    print(f"peak memory of a process that writes {questions} texts: {gb:.2f} GB", flush=True)
    return gb


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?")
    parser.add_argument("--model", type=Path, help="folder of the trained model; made where it does not exist")
    parser.add_argument("--steps", type=int, default=600, help="of the training of the model")
    parser.add_argument("--questions", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", nargs="*", default=names(), help="programs beside ours and transformers")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--memory", action="store_true", help="only print the peak memory of writing the texts")
    main(parser.parse_args())
