"""One trial: a job with a fault at one of its commit points, what it leaves, and whether that is right."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import signal
import time
import traceback
from pathlib import Path

import fault_jobs
import fault_points
from fault_jobs import Job

from launcher.runs import ownership
from launcher.runs.signals import STOPPED, Stopped

DONE, FAILED, WRONG = 0, 3, 1
SIGNALS = {"kill -9": 9, "kill -9 half-way": 9, "kill -9 after": 9, "SIGTERM": 15, "SIGHUP": 1}
LONGEST_S = 60
REFUSALS = (OSError, ValueError, RuntimeError, LookupError)  # what the product raises with a sentence


class Process:
    """A fork that works on a folder and leaves a result: its error, its trace, what it read."""

    def __init__(self, place: Path, work, points: fault_points.Points):
        self._out = place / f"result-{time.monotonic_ns()}.json"
        self.pid = os.fork()
        if self.pid == 0:
            self._run(work, points)
        self.status: int | None = None

    def _run(self, work, points) -> None:
        signal.alarm(LONGEST_S)
        result, status = {}, WRONG
        try:
            ownership.SILENT_S = 0.3
            fault_points.install(points)
            result["value"] = json.loads(json.dumps(work()))
            status = DONE
        except (Stopped, KeyboardInterrupt) as error:
            result["error"], status = repr(error), STOPPED
        except BaseException as error:
            status = FAILED if isinstance(error, REFUSALS) and str(error) else WRONG
            result["error"] = f"{type(error).__name__}: {error}"
            result["traceback"] = traceback.format_exc()[-3000:]
        finally:
            result["trace"] = points.seen
            self._out.write_text(json.dumps(result))
            os._exit(status)

    def wait(self, *, until_stopped: bool = False) -> int | None:
        """Its exit status, or minus a signal; None where it was stopped."""
        _, status = os.waitpid(self.pid, os.WUNTRACED if until_stopped else 0)
        self.status = None if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status)
        return self.status

    def poll(self) -> bool:
        """Whether it has ended."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid:
            self.status = os.waitstatus_to_exitcode(status)
        return bool(pid)

    def waits_for_lock(self) -> bool:
        """Whether another process holds a lock that it waits for."""
        lines = Path("/proc/locks").read_text().splitlines()
        return any("->" in line and f" {self.pid} " in line for line in lines)

    @functools.cached_property
    def result(self) -> dict:
        return json.loads(self._out.read_text()) if self._out.exists() else {}


class Trials:
    """The trials of one job in a folder."""

    def __init__(self, place: Path, name: str, job: Job, seed: int):
        self.place, self.name, self.job, self.seed = place, name, job, seed
        self.folder = place / "trial"
        run = job.run
        self.run = functools.partial(run, shared=place / "shared") if run is fault_jobs.generate else run
        first, second = (self._undisturbed(), self._undisturbed())
        assert first["status"] == DONE, first["result"].get("traceback", first)
        self.expected = first["result"]["value"]
        assert second["result"]["value"] == self.expected, f"{name} has no fixed result"
        self.points = first["trace"]
        assert second["trace"] == self.points, f"{name} has no fixed order of commit points"

    def _undisturbed(self) -> dict:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        process = self._start(self._points(None, -1))
        process.wait()
        again = self._again()
        return {"status": again.status, "trace": process.result.get("trace"), "result": again.result}

    def _points(self, fault: str | None, number: int) -> fault_points.Points:
        return fault_points.Points(
            self.folder,
            fault=fault,
            number=number,
            seed=f"{self.seed} {self.name} {number}",
            note=(self.place / "changed").write_text,
        )

    def _start(self, points: fault_points.Points, *, reads: bool = False, runs: bool = True, **options) -> Process:
        def work():
            if runs:
                self.run(self.folder, **options)
            return [self.job.read(self.folder), fault_jobs.contents(self.folder, self.job.volatile)] if reads else None

        return Process(self.place, work, points)

    def _again(self, **options) -> Process:
        process = self._start(self._points(None, -1), reads=True, **options)
        process.wait()
        return process

    def _start_settling(self) -> None:
        Process(self.place, lambda: self.job.settle(self.folder), self._points(None, -1)).wait()

    def can_happen(self, fault: str, number: int) -> bool:
        kind, _, has_bytes = self.points[number]
        if fault == "kill -9 half-way":
            return kind == "line"
        if fault == "changed byte":
            return has_bytes
        return fault != "store away" or self.job.has_store

    def trial(self, fault: str, number: int) -> tuple[str, str]:
        """The outcome of a fault at a point ("wrong" where it is not right), and more about it."""
        for old in self.place.glob("result-*.json"):
            old.unlink()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        first = self._start(self._points(fault, number))
        if fault == "SIGSTOP":
            return self._stopped(first, number)
        first.wait()
        if problem := self._problem_of_end(first, fault, number):
            return "wrong", problem
        if self.name == "folder" and (self.folder / "standing.json").exists() and not (self.folder / "model").exists():
            return "wrong", "neither the old folder nor the new one"
        again = self._again()
        if fault == "changed byte":
            return self._changed(first, again)
        return self._same(again, first)

    def _problem_of_end(self, first: Process, fault: str, number: int) -> str:
        allowed = {
            "EIO": (DONE, FAILED),
            "ENOSPC": (DONE, FAILED),
            "changed byte": (DONE, FAILED),
            "store away": (DONE, FAILED),
            "clock jump": (DONE,),
        }.get(fault) or ((-9,) if "kill" in fault else (-SIGNALS[fault], STOPPED, DONE))
        if first.status not in allowed:
            return f"it ended with {first.status}: {first.result.get('traceback', first.result.get('error'))}"
        trace = first.result.get("trace")
        if trace is not None and trace[: number + 1] and trace[number][:2] != self.points[number][:2]:
            return f"the point was {trace[number]}"
        return ""

    def _same(self, again: Process, first: Process) -> tuple[str, str]:
        if again.status == DONE and again.result["value"] == self.expected:
            return "same", ""
        said = again.result.get("traceback") or _difference(self.expected, again.result.get("value"))
        return "wrong", f"again: {again.status}, {said}; first: {first.status} {first.result.get('error', '')}"

    def _stopped(self, first: Process, number: int) -> tuple[str, str]:
        if first.wait(until_stopped=True) is not None:
            return "wrong", f"it ended with {first.status} and was not stopped"
        if not self.job.is_owned:
            os.kill(first.pid, signal.SIGCONT)
            first.wait()
            again = self._again()
            return self._same(again, first) if first.status == DONE else ("wrong", f"it ended with {first.status}")
        second, outcome = self._start(self._points(None, -1), reads=True, take_over=True), "same"
        num_waiting = 0
        while not second.poll():
            time.sleep(0.01)
            num_waiting = num_waiting + 1 if second.waits_for_lock() else 0
            if num_waiting == 15:  # for the first process, which holds a lock of the folder
                os.kill(first.pid, signal.SIGCONT)
                outcome = "waited"
        os.kill(first.pid, signal.SIGCONT)
        first.wait()
        if second.status != DONE or second.result["value"] != self.expected:
            said = second.result.get("traceback") or _difference(self.expected, second.result.get("value"))
            return "wrong", f"the second process: {second.status}, {said}"
        self._start_settling()
        read = self._again(runs=False)
        same, said = self._same(read, first)
        return (outcome, "") if same == "same" else ("wrong", f"after the first one continued: {said}")

    def _changed(self, first: Process, again: Process) -> tuple[str, str]:
        changed = (self.place / "changed").read_text()
        name = re.sub(r"^\.tmp-", "", Path(changed).name)
        value = (again.result.get("value") or [None])[0]
        if again.status == DONE and value == self.expected[0]:
            return "same", changed
        said = f"{first.result.get('error', '')} {again.result.get('error', '')}"
        if again.status == FAILED and name in said:
            target = next((path for path in self.folder.rglob(name) if str(path).endswith(name)), None)
            if target is not None and (self.folder / changed).is_file():
                (self.folder / changed).unlink()
            third = self._again()
            is_made = third.status == DONE and third.result["value"][0] == self.expected[0]
            return ("named, made again" if is_made else "named"), changed
        if self.job.is_unprotected(changed):
            return "unprotected", changed
        shown = again.result.get("traceback") or _difference(self.expected[:1], [value])
        return "wrong", f"{changed}: {again.status}, {shown}"


def _difference(expected, found) -> str:
    texts = [json.dumps(value, sort_keys=True) for value in (expected, found)]
    first = next((i for i, pair in enumerate(zip(*texts, strict=False)) if pair[0] != pair[1]), min(map(len, texts)))
    return " / ".join(text[max(0, first - 120) : first + 120] for text in texts)
