"""Shares of a rank's time by its GPU's clock, against a simulated GPU that works behind its host."""

from __future__ import annotations

import pytest
import torch

from launcher.training.laps import DeviceLaps, HostLaps, open_laps
from launcher.training.throughput import COUNTS, Meter


class SimulatedGpu:
    """A host's clock, and a stream that does what was launched, one after the other."""

    def __init__(self):
        self.now = self.free_at = 0.0
        self.waits = 0

    def launch(self, *, host, device):
        self.now += host
        self.free_at = max(self.now, self.free_at) + device

    def wait(self):
        self.now = max(self.now, self.free_at)

    def event(self):
        return SimulatedEvent(self)


class SimulatedEvent:
    def __init__(self, gpu):
        self.gpu = gpu

    def record(self):
        self.at = max(self.gpu.now, self.gpu.free_at)

    def query(self):
        return self.gpu.now >= self.at

    def synchronize(self):
        self.gpu.waits += 1
        self.gpu.now = max(self.gpu.now, self.at)

    def elapsed_time(self, later):
        return 1000 * (later.at - self.at)


def run_step(gpu, laps):
    """Half a second for data, a quarter of own work, two blocks, an update, and the wait for the loss."""
    gpu.now += 0.5
    laps.lap("data")
    gpu.now += 0.25
    for _ in range(2):
        laps.lap("own")
        gpu.launch(host=0.125, device=1.0)
        laps.lap("forward")
        gpu.launch(host=0.125, device=2.0)
        laps.lap("backward")
    gpu.launch(host=0.125, device=0.5)
    laps.lap("update")
    gpu.wait()
    laps.lap("wait")


def test_the_backward_pass_of_a_gpu_is_not_charged_to_what_the_host_does_next():
    gpu = SimulatedGpu()
    laps = DeviceLaps(gpu.event)
    run_step(gpu, laps)
    found = laps.read()
    # The first forward pass starts when the host has launched it, the others right after the work before them.
    assert found == pytest.approx(
        {
            "data": 0.5,
            "own": 0.25,
            "forward": 2.125,
            "backward": 4.0,
            "update": 0.5,
            "wait": 0.0,
            "device_idle": 0.75,
        }
    )
    assert sum(found.values()) - found["device_idle"] == pytest.approx(gpu.now)


def test_marks_wait_for_nothing_and_a_point_waits_once():
    gpu = SimulatedGpu()
    laps = DeviceLaps(gpu.event)
    for _ in range(3):
        run_step(gpu, laps)
        laps.fold()
    gpu.launch(host=0.0, device=5.0)
    laps.lap("checkpoint")
    laps.fold()  # not passed yet: left for later
    assert gpu.waits == 0
    assert laps.read()["checkpoint"] == pytest.approx(5.0) and gpu.waits == 1
    run_step(gpu, laps)
    assert "checkpoint" not in laps.read()


def test_marks_are_used_again_and_do_not_pile_up():
    gpu, made = SimulatedGpu(), []

    def make():
        made.append(gpu.event())
        return made[-1]

    laps = DeviceLaps(make)
    for _ in range(50):
        run_step(gpu, laps)
        laps.fold()
    assert len(made) <= 10  # as many as a step has


def test_a_restart_forgets_what_was_before():
    gpu = SimulatedGpu()
    laps = DeviceLaps(gpu.event)
    run_step(gpu, laps)
    laps.restart()
    run_step(gpu, laps)
    assert laps.read()["backward"] == pytest.approx(4.0)


def test_a_processor_keeps_the_clock_of_the_host_and_has_no_idle_device():
    assert isinstance(open_laps(torch.device("cpu")), HostLaps)
    meter = Meter(peak_flops=1e9)
    meter.lap("forward")
    meter.add([1.0] * len(COUNTS))
    point = meter.collect()
    assert {"time_share_forward", "time_share_own"} <= point.keys() and "time_share_device_idle" not in point
    shares = [value for name, value in point.items() if name.startswith("time_share_")]
    assert 0.5 < sum(shares) <= 1.0
