"""Real hosts on one machine: each has a network, processes, a name, a /tmp/ray and shared memory of its own.

    with network(folder) as hosts:
        head, worker = hosts.add("head"), hosts.add("worker")
        head.run(["ray", "start", ...])
        hosts.lose(worker)                   # no cable and no process from one moment to the next

A host is a process of Linux namespaces; commands enter them. When it is killed the kernel kills all that runs
in it, and its network goes with it. The files of the machine are a file system that all hosts share, as NFS
would be. `ray stop`, which ends every Ray it finds, finds its own host's alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

NAMESPACES = ("--net", "--pid", "--mount", "--uts", "--ipc")
# The first process of a host: it takes over orphans and lets none of them stay a zombie.
FIRST_PROCESS = """
import signal
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
print("ready", flush=True)
while True:
    signal.pause()
"""


def why_not() -> str | None:
    """Why this machine cannot make hosts; None where it can."""
    if sys.platform != "linux":
        return f"network namespaces are Linux's, this is {sys.platform}"
    if os.geteuid() != 0:
        return "making network namespaces needs root"
    if missing := [name for name in ("ip", "unshare", "nsenter", "mount") if shutil.which(name) is None]:
        return f"not installed: {', '.join(missing)} (iproute2, util-linux)"
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        try:
            hosts = stack.enter_context(network(folder))
            hosts.add("a").run(["true"])
        except (subprocess.CalledProcessError, OSError, RuntimeError) as error:
            output = getattr(error, "stderr", "") or ""
            return f"no network namespaces here: {error} {output}".strip()
    return None


@dataclasses.dataclass(frozen=True)
class Host:
    """A running host; ``pid`` is its first process, as the machine sees it."""

    name: str
    address: str
    pid: int
    folder: Path

    def command(self, command: Sequence[str]) -> list[str]:
        """The command, to be run on this host."""
        return ["nsenter", "--target", str(self.pid), *NAMESPACES, "--", *command]

    def run(
        self, command: Sequence[str], *, check: bool = True, timeout: float | None = None, **options
    ) -> subprocess.CompletedProcess:
        """Run a command on this host and wait for it; its output is text."""
        return subprocess.run(
            self.command(command), check=check, timeout=timeout, capture_output=True, text=True, **options
        )

    def start(self, command: Sequence[str], log: Path, **options) -> subprocess.Popen:
        """Start a command on this host; it writes into ``log``."""
        with open(log, "ab") as file:
            return subprocess.Popen(
                self.command(command), stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, **options
            )


class Network:
    """Hosts on one switch, 10.77.0.1 and up."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.hosts: list[Host] = []
        self._processes: dict[str, subprocess.Popen] = {}
        self._switch = self._start_first_process("switch", ("--net",))
        try:
            self._on_switch("ip", "link", "add", "switch0", "type", "bridge")
            self._on_switch("ip", "link", "set", "switch0", "up")
        except subprocess.CalledProcessError:
            self.end()
            raise

    def add(self, name: str) -> Host:
        """Start a host and plug it in."""
        process = self._start_first_process(name, NAMESPACES)
        pid = _child_of(process.pid)
        number = len(self.hosts) + 1
        host = Host(name, f"10.77.0.{number}", pid, self._folder / name)
        for part in ("ray", "shm"):
            (host.folder / part).mkdir(parents=True, exist_ok=True)
        names = self._folder / "hosts"
        with open(names, "a", encoding="utf-8") as file:
            file.write(f"{host.address} {name}\n" if self.hosts else f"127.0.0.1 localhost\n{host.address} {name}\n")
        host.run(
            [
                "sh",
                "-c",
                f"hostname {name} && ip link set lo up && mount --bind {names} /etc/hosts && mkdir -p /tmp/ray"
                f" && mount --bind {host.folder / 'ray'} /tmp/ray && mount -t tmpfs -o size=2g tmpfs /dev/shm",
            ]
        )
        self._on_switch("ip", "link", "add", f"port{number}", "type", "veth", "peer", "name", "eth0", "netns", str(pid))
        self._on_switch("ip", "link", "set", f"port{number}", "master", "switch0", "up")
        host.run(["sh", "-c", f"ip address add {host.address}/24 dev eth0 && ip link set eth0 up"])
        self.hosts.append(host)
        return host

    def lose(self, host: Host) -> None:
        """Cut a host's cable, then its power: nobody on the network is told anything."""
        host.run(["ip", "link", "set", "eth0", "down"])
        os.kill(host.pid, signal.SIGKILL)
        self._processes.pop(host.name).wait()

    def end(self) -> None:
        """End every host and the switch."""
        for process in [*self._processes.values(), self._switch]:
            with contextlib.suppress(ProcessLookupError, RuntimeError):
                os.kill(_child_of(process.pid), signal.SIGKILL)
            process.wait()
        self._processes.clear()

    def _start_first_process(self, name: str, namespaces: Sequence[str]) -> subprocess.Popen:
        mount_proc = ["--mount-proc"] if "--pid" in namespaces else []
        process = subprocess.Popen(
            ["unshare", *namespaces, "--fork", *mount_proc, sys.executable, "-S", "-c", FIRST_PROCESS],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        if process.stdout.readline().strip() != "ready":
            _, error = process.communicate()
            raise RuntimeError(f"host {name} did not start: {error.strip()}")
        if name != "switch":
            self._processes[name] = process
        return process

    def _on_switch(self, *command: str) -> None:
        subprocess.run(
            ["nsenter", "--target", str(_child_of(self._switch.pid)), "--net", "--", *command],
            check=True,
            capture_output=True,
            text=True,
        )


@contextlib.contextmanager
def network(folder: Path) -> Iterator[Network]:
    """A network whose hosts end with the block; their /tmp/ray lies in ``folder/<name>/ray``."""
    hosts = Network(folder)
    try:
        yield hosts
    finally:
        hosts.end()


def _child_of(pid: int) -> int:
    """The one child of `unshare --fork`: the first process of its namespaces."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if children := Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            return int(children[0])
        time.sleep(0.01)
    raise RuntimeError(f"process {pid} has no child")
