"""Ranks on two hosts listen on the addresses of their common network alone."""

from __future__ import annotations

import json
import os
import sys

import pytest
from hosts import network, why_not

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.processes,
    pytest.mark.skipif((reason := why_not()) is not None, reason=f"needs hosts of its own: {reason}"),
]

RANK = """
import json, os, psutil, torch
import torch.distributed as dist
from launcher.training.rank_sockets import listen_on_ranks_network

listen_on_ranks_network()
dist.init_process_group("gloo")
dist.all_reduce(total := torch.ones(1))
listening = {each.laddr.ip for each in psutil.Process().net_connections("inet") if each.status == "LISTEN"}
print(json.dumps([int(total), os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"], sorted(listening)]))
dist.barrier()
"""


@pytest.mark.parametrize("by_name", [True, False])
def test_ranks_on_two_hosts_meet_and_listen_on_their_network_alone(tmp_path, by_name):
    with network(tmp_path) as hosts:
        head, worker = hosts.add("head"), hosts.add("worker")
        ranks = []
        for rank, host in enumerate((head, worker)):
            environment = os.environ | {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
            environment |= {"MASTER_ADDR": "head" if by_name else head.address, "MASTER_PORT": "29511"}
            for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
                environment.pop(name, None)
            log = tmp_path / f"rank{rank}.log"
            ranks.append((host, log, host.start([sys.executable, "-c", RANK], log, env=environment)))
        for host, log, process in ranks:
            assert process.wait(100) == 0, log.read_text()
            assert json.loads(log.read_text().splitlines()[-1]) == [2, "eth0", "=eth0", [host.address]]
