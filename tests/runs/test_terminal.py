"""Ctrl-C, a closed terminal and a closed pipe, as a person makes them: commands in a pseudo-terminal."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from launcher.runs.journal import JournalReader
from launcher.runs.run_dir import RunDir
from launcher.runs.signals import (
    STOP_SIGNALS,
    Stopped,
    StopRequest,
    handling_stop,
    sigterm_stops,
)

SIZES = [
    "data.mini_sqa.num_train=64",
    "data.mini_sqa.num_val=16",
    "data.mini_sqa.num_test=16",
    "data.samples_per_shard=24",
    "rationale.num_steps=4000",
    "rationale.max_target_tokens=24",
    "answer.num_steps=6",
    "training.checkpoint_every=1000",
    "training.validate_every=1000",
    "training.log_every=1",
]
RUN = ["run", "--preset", "demo", *[part for size in SIZES for part in ("--set", size)]]


class Terminal:
    """A command in the foreground of a terminal of its own."""

    def __init__(self, folder, *arguments):
        self.master, slave = os.openpty()

        def own_terminal():
            os.login_tty(slave)
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # as a shell starts it, however the tests were started

        self.process = subprocess.Popen(
            [sys.executable, "-m", "launcher", *arguments], cwd=folder, preexec_fn=own_terminal
        )
        os.close(slave)
        self.output, self.started = b"", []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self):
        while True:
            try:
                data = os.read(self.master, 65536)
            except OSError:  # its other side is closed
                return
            self.output += data

    def wait_for(self, happened, timeout=150):
        deadline = time.time() + timeout
        while not happened():
            assert self.process.poll() is None and time.time() < deadline, self.text
            time.sleep(0.02)
        self.started = psutil.Process(self.process.pid).children(recursive=True)

    def press_ctrl_c(self):
        os.write(self.master, b"\x03")

    def end(self, timeout):
        """The exit status; every process that was there when ``wait_for`` returned must be gone soon after."""
        status = self.process.wait(timeout)
        self.reader.join(2)
        _gone, alive = psutil.wait_procs(self.started, timeout=20)
        assert alive == []
        return status

    @property
    def text(self):
        return self.output.decode(errors="replace")


def steps(run_dir):
    return [point["step"] for point in JournalReader(run_dir.journal("rationale")).read() if "loss" in point["metrics"]]


@pytest.mark.long
@pytest.mark.ray
def test_ctrl_c_writes_a_checkpoint_the_same_command_goes_on_from_it_and_a_second_one_ends_at_once(tmp_path):
    run_dir = RunDir(tmp_path / "runs" / "demo")
    first = Terminal(tmp_path, *RUN)
    first.wait_for(lambda: len(steps(run_dir)) >= 3)
    assert len(first.started) > 5
    first.press_ctrl_c()
    assert first.end(60) == 143, first.text
    reached = steps(run_dir)[-1]
    assert (run_dir.checkpoints("rationale") / "LATEST").read_text() == f"step-{reached:06d}\n" and 3 <= reached < 1000
    assert f"stopped after step {reached}, as requested; its checkpoint is committed" in first.text
    assert "the same command" in first.text and "Traceback" not in first.text
    again = Terminal(tmp_path, *RUN)
    again.wait_for(lambda: len(steps(run_dir)) >= reached + 2)
    assert steps(run_dir)[reached] == reached + 1  # not from the start
    again.press_ctrl_c()
    again.wait_for(lambda: "stop requested: writing a checkpoint first" in again.text)
    pressed = time.time()
    again.press_ctrl_c()
    assert again.end(10) == -signal.SIGINT and time.time() - pressed < 30 and "Traceback" not in again.text


@pytest.mark.long
@pytest.mark.ray
def test_a_closed_terminal_writes_a_checkpoint_too(tmp_path):
    run_dir = RunDir(tmp_path / "runs" / "demo")
    run = Terminal(tmp_path, *RUN)
    run.wait_for(lambda: len(steps(run_dir)) >= 3)
    os.close(run.master)
    assert run.end(60) == 143
    assert (run_dir.checkpoints("rationale") / "LATEST").read_text() == f"step-{steps(run_dir)[-1]:06d}\n"


def test_ctrl_c_in_a_command_that_only_computes_ends_in_a_sentence(tmp_path):
    terminal = Terminal(tmp_path, "data", "make", "out", "--num-train", "200000")
    terminal.wait_for(lambda: psutil.Process(terminal.process.pid).cpu_times().user > 1.5)  # imports take a third of it
    terminal.press_ctrl_c()
    assert terminal.end(20) == 130
    assert "stopped by Ctrl-C" in terminal.text and "Traceback" not in terminal.text


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_every_signal_that_asks_to_stop_unwinds_a_step_alike(number):
    before = [signal.getsignal(each) for each in STOP_SIGNALS]
    with pytest.raises(Stopped, match="the same command resumes"), sigterm_stops():
        os.kill(os.getpid(), number)
        time.sleep(5)
    assert [signal.getsignal(each) for each in STOP_SIGNALS] == before


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_every_one_of_them_asks_a_rank_for_a_checkpoint_however_often_it_comes(number, tmp_path):
    request = StopRequest(RunDir(tmp_path), attempt=1)
    with request.listening():
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # torchrun and srun may both send it
        assert request.seen()


def test_a_signal_that_the_process_was_started_to_ignore_stays_ignored():
    before, seen = signal.signal(signal.SIGHUP, signal.SIG_IGN), []
    try:
        with handling_stop(lambda number, frame: seen.append(number)):
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        assert signal.signal(signal.SIGHUP, before) is signal.SIG_IGN
    assert seen == [signal.SIGINT]


SLOW_END = """
import subprocess, time
from launcher.runs.signals import sigterm_stops
with sigterm_stops():
    subprocess.Popen(["sleep", "600"], start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("ending", flush=True)
        time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_a_step_and_all_it_started_at_once_and_a_second_hangup_does_not(number):
    process = subprocess.Popen([sys.executable, "-c", SLOW_END], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    (child,) = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGHUP)
    assert process.stdout.readline() == "ending\n"
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    process.send_signal(number)
    assert process.wait(5) == -number and child in psutil.wait_procs([child], timeout=5)[0]


def test_a_pipe_that_nobody_reads_ends_the_printing_and_not_the_work(tmp_path):
    code = "from launcher.cli.options import say\nfor n in range(3): say('x' * 100000)\nopen('done', 'w').close()"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    assert process.wait(30) == 0 and process.stderr.read() == "" and re.search("done", " ".join(os.listdir(tmp_path)))
