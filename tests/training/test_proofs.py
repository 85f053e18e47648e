"""A start of a training: who takes part proves it before the first value, and nothing listens elsewhere."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist
from forked_ranks import free_port

from data_shards.atomic_files import commit_json, read_json
from launcher.runs.run_dir import RunDir
from launcher.training import rank_sockets
from launcher.training.launch import WorkersFailed, launch_training

pytestmark = pytest.mark.processes


def start_ranks(jobs, folder):
    """Start a rank a job, as srun does; returns the processes and what each found."""
    port, ranks = free_port(), []
    for rank, job in enumerate(jobs):
        commit_json(folder / f"job{rank}.json", job.to_json())
        environment = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(jobs))}
        environment |= {"LOCAL_WORLD_SIZE": str(len(jobs)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environment |= {"OMP_NUM_THREADS": "1"}
        script = Path(__file__).parents[1] / "helpers" / "watched_rank.py"
        command = [sys.executable, str(script), str(folder / f"found{rank}.json"), str(folder / f"job{rank}.json")]
        ranks.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate(timeout=200)[1] for process in ranks]
    found = [read_json(folder / f"found{rank}.json") for rank in range(len(jobs))]
    return [process.returncode for process in ranks], errors, found


@pytest.fixture(scope="module")
def proved(make_job, tmp_path_factory):
    """What the two ranks of a small training met."""
    job = dataclasses.replace(make_job("proved"), num_steps=1)
    statuses, errors, found = start_ranks([job, job], tmp_path_factory.mktemp("proved"))
    assert statuses == [0, 0], errors
    return found


def test_the_first_exchange_of_every_group_is_the_proof_of_its_members(proved):
    for found in proved:
        firsts = {}
        for name, group, proving in found["collectives"]:
            firsts.setdefault(group, (name, proving))
        assert len(firsts) >= 2 and all(proving for _, proving in firsts.values()), firsts  # DeepSpeed opens its own
        assert not all(proving for _, _, proving in found["collectives"])  # weights and gradients were seen too


def test_ranks_of_one_machine_listen_on_loopback_alone(proved):
    for rank, found in enumerate(proved):
        assert {address for address, _ in found["listening"]} == {"127.0.0.1"}
        assert len(found["listening"]) >= 2 - rank  # gloo's, and on rank 0 the store's
        assert found["environment"] == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "=lo"}


def test_a_rank_without_the_token_ends_the_start_on_every_rank_with_a_sentence(make_job, tmp_path):
    job = make_job("real")
    stranger = dataclasses.replace(job, run_dir=make_job("stranger").run_dir)
    statuses, errors, found = start_ranks([job, stranger], tmp_path)
    assert statuses == [2, 2]
    for rank, error in enumerate(errors):
        assert f"rank {rank}: rank {1 - rank} joined this training without the token of its run" in error
        assert "Traceback" not in error
        assert found[rank]["collectives"] and all(proving for _, _, proving in found[rank]["collectives"])
    assert not RunDir(Path(job.run_dir)).checkpoints("rationale").exists()


def in_workers(monkeypatch, before):
    """Have every Ray worker call ``before(job, rank)`` first; both functions travel to the workers by value."""

    def worker(job, *, rank, **places):
        from launcher.training.ray_worker import run_worker

        before(job, rank)
        run_worker(job, rank=rank, **places)

    monkeypatch.setattr("launcher.training.launch.run_worker", worker)


@pytest.mark.ray
def test_ranks_of_a_local_ray_listen_on_loopback_beside_rays_own_ports(make_job, ray_up, monkeypatch):
    def note(job, rank):
        from data_shards.atomic_files import commit_json
        from launcher.training import loop

        def note_after_the_check(token, check=loop.check_every_group):
            check(token)
            found = [[*each.laddr[:2]] for each in psutil.Process().net_connections("inet") if each.status == "LISTEN"]
            master = [os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])]
            commit_json(f"{job.run_dir}/listening{rank}.json", {"master": master, "listening": found})

        loop.check_every_group = note_after_the_check

    in_workers(monkeypatch, note)
    job = dataclasses.replace(make_job("ray-listening"), num_steps=1)
    launch_training(job)
    for rank in (0, 1):
        found = read_json(Path(job.run_dir) / f"listening{rank}.json")
        assert found["master"][0] == "127.0.0.1" and (found["master"] in found["listening"]) == (rank == 0)
        elsewhere = [address for address, _ in found["listening"] if address != "127.0.0.1"]
        assert elsewhere == ["::"]  # a Ray worker's own server, which asks for Ray's token
        assert len(found["listening"]) >= 3 - rank  # and gloo's


@pytest.mark.ray
def test_under_ray_a_rank_without_the_token_ends_the_training_with_a_sentence(make_job, ray_up, monkeypatch):
    def forget(job, rank):
        from launcher.runs.run_dir import RunDir

        if rank == 1:
            RunDir.rank_token = lambda self: "another"

    in_workers(monkeypatch, forget)
    lines = []
    with pytest.raises(WorkersFailed) as caught:
        launch_training(make_job("ray-stranger"), report=lines.append)
    text = str(caught.value)
    assert "joined this training without the token of its run" in text and "Traceback" not in text and lines == []


# Which interface


@pytest.fixture
def ranks(monkeypatch):
    """Sets the variables of a rank."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(rank_sockets.rendezvous, "_create_c10d_store", rank_sockets._open_store)

    def given(**variables):
        for name, value in ({"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 1} | variables).items():
            monkeypatch.setenv(name, str(value))
        rank_sockets.listen_on_ranks_network()
        return os.environ.get("GLOO_SOCKET_IFNAME"), os.environ.get("NCCL_SOCKET_IFNAME")

    return given


def own_network():
    """An interface of this machine that is not loopback, and its address."""
    for name, addresses in psutil.net_if_addrs().items():
        for each in addresses:
            if each.family == socket.AF_INET and not each.address.startswith("127."):
                return name, each.address
    pytest.skip("this machine has no network but loopback")


def test_ranks_of_a_cluster_use_the_interface_of_the_masters_network(ranks):
    name, address = own_network()
    assert ranks(MASTER_ADDR=address) == (name, f"={name}")


def test_a_variable_that_is_set_remains(ranks):
    _, address = own_network()
    assert ranks(MASTER_ADDR=address, GLOO_SOCKET_IFNAME="ib0", NCCL_SOCKET_IFNAME="ib") == ("ib0", "ib")


@pytest.mark.parametrize("master", ["127.0.1.1", "localhost", "no.such.host.invalid"])
def test_a_name_that_leads_to_loopback_on_one_of_several_machines_decides_nothing(ranks, master):
    assert ranks(MASTER_ADDR=master) == (None, None)


def test_the_store_listens_on_the_masters_address_alone(ranks):
    _, address = own_network()
    port = free_port()
    ranks(MASTER_ADDR=address)
    store, _, _ = next(dist.rendezvous(f"tcp://{address}:{port}?rank=0&world_size=1"))
    store.set("a", "b")
    assert store.get("a") == b"b"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)
    socket.create_connection((address, port), timeout=5).close()
