"""Two gloo ranks that exchange values, for tests: ``collective_ranks.py RANK FOLDER``; writes the outcomes as JSON.

Rank 1 also acts as an attacker: it sends what ``launcher.training.collectives`` never sends, above all a pickle that
runs code.
"""

import functools
import json
import os
import pickle
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from launcher.runs.run_dir import RunDir
from launcher.training.collectives import (
    MAX_BYTES,
    CollectiveError,
    _new_group,
    broadcast_json,
    check_every_group,
    check_members,
    gather_json,
    refuse_pickles,
)

NESTED = {"b": [1, 2.5, None, True], "a": {"ä": "\ud800 \N{SNOWMAN}", "empty": {}}}


class Malice:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def outcome(call):
    try:
        return {"value": call()}
    except (CollectiveError, TypeError) as error:
        return {"error": f"{type(error).__name__}: {error}"}


def send_raw(content, announced=None):
    """Take part in ``gather_json`` with bytes of one's own."""
    size = torch.tensor([len(content) if announced is None else announced])
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(2)]
    dist.all_gather(sizes, size)
    if announced is None:
        own = torch.zeros(int(max(sizes)), dtype=torch.uint8)
        own[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        dist.all_gather([torch.empty_like(own) for _ in range(2)], own)


def main():
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {
        "gathered": gather_json({"rank": rank, "text": "x" * (5000 * rank)}),
        "nested": broadcast_json(NESTED if rank == 0 else object()) == NESTED,
        "from_rank_1": broadcast_json([rank], source=1),
        "path": outcome(lambda: gather_json(folder)),
        "same_token": outcome(lambda: check_members(RunDir(folder).rank_token())),
        "other_token": outcome(lambda: check_members(f"token {rank}")),
    }
    for name, content, announced in (
        ("pickle", pickle.dumps(Malice(folder / "from-gather")), None),
        ("deep", b"[" * 100_000, None),
        ("empty", b"", 0),
        ("negative", b"", -1),
        ("huge", b"", MAX_BYTES + 1),
    ):
        if rank == 0:
            found[name] = outcome(lambda: gather_json("mine"))
        else:
            send_raw(content, announced)
    check_every_group("shared")
    found["known_group"] = outcome(lambda: dist.new_group([0, 1]) and None)
    if rank == 0:
        found["later_group"] = outcome(lambda: dist.new_group([0, 1]) and None)
    else:  # joins without the token
        found["later_group"] = outcome(lambda: check_members("other", group=_new_group([0, 1])))
    refuse_pickles()
    for name in ("gather", "broadcast"):
        values = [Malice(folder / f"from-torch-{name}")]
        if name == "gather":
            call = functools.partial(dist.all_gather_object, [None, None], values[0])
        else:
            call = functools.partial(dist.broadcast_object_list, values, src=1)
        found[f"torch_{name}"] = outcome(call)
    (folder / f"found{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
