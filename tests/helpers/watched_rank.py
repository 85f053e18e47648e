"""A rank as torchrun starts it, watched: ``watched_rank.py FOUND.json JOB.json``.

Writes down each collective with its group and whether it is part of a proof of the run's token, and what listens.
"""

import json
import os
import sys
from pathlib import Path

import psutil
import torch.distributed as dist

from launcher.training import collectives, loop, torchrun

COLLECTIVES = [
    name
    for name in dir(dist.ProcessGroup)
    if any(part in name for part in ("reduce", "gather", "broadcast", "scatter", "alltoall", "send", "recv", "barrier"))
]


def main():
    found = {"collectives": [], "listening": [], "environment": {}}
    proving = []

    def watched(name):
        call = getattr(dist.ProcessGroup, name)

        def noted(group, *arguments, **options):
            found["collectives"].append([name, group.group_name, bool(proving)])
            return call(group, *arguments, **options)

        setattr(dist.ProcessGroup, name, noted)

    check = collectives.check_members

    def noted_check(*arguments, **options):
        proving.append(True)
        try:
            check(*arguments, **options)
        finally:
            proving.pop()

    init = loop.init_distributed

    def noted_init(**options):
        init(**options)
        found["listening"] = [
            [*each.laddr] for each in psutil.Process().net_connections("inet") if each.status == "LISTEN"
        ]
        found["environment"] = {name: value for name, value in os.environ.items() if name.endswith("SOCKET_IFNAME")}

    for name in COLLECTIVES:
        watched(name)
    collectives.check_members = noted_check
    loop.init_distributed = noted_init
    try:
        return torchrun.main(sys.argv[2:])
    finally:
        Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    sys.exit(main())
