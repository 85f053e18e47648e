"""Where the sockets of a training's rank listen: on the network that its ranks use, and on no other.

torch's store listens on every interface by default, gloo on the one that the machine's name resolves to.
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from importlib import import_module
from typing import Any

import psutil
from torch.distributed.distributed_c10d import Store

rendezvous: Any = import_module("torch.distributed.rendezvous")  # the name in its package is a function
_open_store = rendezvous._create_c10d_store  # torch's own


def listen_on_ranks_network() -> None:
    """Have torch's store, gloo and NCCL of this process use the interface that leads to MASTER_ADDR.

    It is called before the group is opened. ``GLOO_SOCKET_IFNAME`` and ``NCCL_SOCKET_IFNAME`` remain where they are
    set. Nothing is changed where MASTER_ADDR leads to loopback although ranks of other machines may have to connect,
    as where /etc/hosts maps a machine's own name to 127.0.1.1.
    """
    rendezvous._create_c10d_store = _open_bound_store
    address = _own_address()
    if name := address and _interface_of(address):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # this name, not all that begin with it


def _own_address() -> str | None:
    """The address of this machine in the network that leads to MASTER_ADDR; None where it cannot be known."""
    if not (master := os.environ.get("MASTER_ADDR")):
        return None
    try:
        family, *_, target = socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)  # sends nothing
            address = probe.getsockname()[0]
    except OSError:
        return None
    one_machine = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    return address if one_machine or not (address.startswith("127.") or address == "::1") else None


def _interface_of(address: str) -> str | None:
    if address.startswith("127."):  # all of it is loopback's
        address = "127.0.0.1"
    found = psutil.net_if_addrs().items()
    return next((name for name, addresses in found if any(each.address == address for each in addresses)), None)


def _open_bound_store(
    hostname: str, port: int, rank: int, world_size: int, timeout: timedelta, use_libuv: bool = True
) -> Store:
    """Open torch's store; where this process serves it, on its own address alone."""
    address = _own_address()
    if rank != 0 or rendezvous._torchelastic_use_agent_store() or address is None:
        return _open_store(hostname, port, rank, world_size, timeout, use_libuv)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.create_server((address, port), family=family, backlog=2048)
    return rendezvous.TCPStore(
        host_name=hostname,
        port=port,
        world_size=world_size,
        is_master=True,
        timeout=timeout,
        multi_tenant=True,
        master_listen_fd=listener.detach(),  # the store closes it
        use_libuv=use_libuv,
    )
