"""One attempt at a run: the state that its steps share, and the markers of done steps.

A step is done if its marker exists and its inputs are the same. The first step that needs Ray or MLflow opens it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

from launcher.cluster.ray_session import ray_session
from launcher.config.settings import Settings
from launcher.report.render import write_report
from launcher.runs.code_version import begin_with_code, code_of_step
from launcher.runs.exported import verify_model
from launcher.runs.progress import Phase, StepHeading
from launcher.runs.run_dir import RunDir, RunError
from launcher.tracking.run_log import RunLog, Tracker, open_tracker

Report = Callable[[str], None]


class Attempt:
    """The state that the steps of one attempt share.

    Attributes:
        number: of the attempt; a process of an older attempt may not commit anything.
        outputs: of every finished step, by its name.
        num_run: number of steps that this attempt has run.
    """

    def __init__(
        self,
        settings: Settings,
        run_dir: RunDir,
        number: int,
        report: Report,
        resources: contextlib.ExitStack,
        *,
        parent_key: str | None = None,
        arm: str | None = None,
        sends: bool = True,
    ) -> None:
        self.settings, self.run_dir, self.number, self.report = settings, run_dir, number, report
        self._resources, self._parent_key, self._arm, self._sends = resources, parent_key, arm, sends
        self._tracker: Tracker | None = None
        self._ray_open = False
        self._begun: dict[str, float] = {}  # the time when a step was announced
        self.num_run = 0
        self.outputs: dict[str, dict[str, Any]] = {}

    @property
    def tracker(self) -> Tracker:
        """The run's tracker, opened at the first use."""
        if self._tracker is None:
            self._tracker = self._resources.enter_context(
                open_tracker(
                    self.settings,
                    self.run_dir,
                    report=self.report,
                    parent_key=self._parent_key,
                    arm=self._arm,
                    sends=self._sends,
                    may_log=lambda: self.run_dir.check_attempt(self.number),
                )
            )
        return self._tracker

    def open_ray(self) -> None:
        """Open the Ray session of this attempt, once."""
        if not self._ray_open:
            address = self.settings.cluster.address
            self.report(Phase("  starting Ray" if address == "local" else f"  connecting to Ray at {address}"))
            self._resources.enter_context(ray_session(self.settings.cluster))
            self._ray_open = True

    def begin_step(self, name: str) -> None:
        """Print a step's heading, once; its time counts from here."""
        if name not in self._begun:
            steps = self.settings.chain.steps
            self._begun[name] = time.time()
            self.report(StepHeading(f"\n[{steps.index(name) + 1}/{len(steps)}] {name}"))
            if note := begin_with_code(self.run_dir, name):
                self.report(note)

    def run_step(self, name: str, inputs: dict[str, Any], run: Callable[[RunLog], dict[str, Any]]) -> dict[str, Any]:
        """Run a step unless its marker exists; returns its outputs."""
        marker = self.run_dir.marker(name, needs=("inputs", "outputs"))
        if marker is not None:
            if (stored := marker["inputs"]) != inputs:
                changed = next(key for key in {**inputs, **stored} if stored.get(key) != inputs.get(key))
                raise RunError(
                    f"{self.run_dir.path}: step {name!r} was done with {changed} = {stored.get(changed)!r}, "
                    f"now it is {inputs.get(changed)!r}; start another run.dir, or restore what it was done with"
                )
            self._check_outputs(name, marker["outputs"])
            self.outputs[name] = marker["outputs"]
            return marker["outputs"]
        self.verify_models()
        self.begin_step(name)
        with self.tracker.step(name) as child:
            outputs = run(child)
            self.run_dir.check_attempt(self.number)
            seconds = round(time.time() - self._begun[name], 1)
            child.log_scores({"step_seconds": seconds})
        self.run_dir.check_attempt(self.number)
        self.run_dir.mark_done(  # after its end is logged: a marked step is never opened again
            name,
            {
                "step": name,
                "inputs": inputs,
                "outputs": outputs,
                "attempt": self.number,
                "seconds": seconds,
                "code": code_of_step(self.run_dir, name),
            },
        )
        self.report(f"{name} took {seconds:.0f} s")
        self.outputs[name] = outputs
        self.num_run += 1
        return outputs

    def _check_outputs(self, name: str, outputs: dict[str, Any]) -> None:
        """Refuse a marker without the sha256 of the model that the step trained, which later steps compare."""
        stage = self.settings.chain.stage_of_step(name)
        if stage and not isinstance(outputs.get(f"{stage.name}_model"), str):
            raise RunError(
                f"{self.run_dir.marker_path(name)} has no output {stage.name}_model, expected its sha256; restore it, "
                f"or delete it and {self.run_dir.model(stage.name)}, and run again"
            )

    def verify_models(self) -> None:
        """Verify the models of finished steps by their markers, before a step that may use or publish them."""
        for stage in self.settings.chain.stages:
            if self.run_dir.marker(stage.step) is not None:
                verify_model(self.run_dir.model(stage.name))

    def write_report(self) -> None:
        """Write the HTML report; an error in it is reported and does not fail the run."""
        path = self.run_dir.report
        self.report(Phase("  writing the report"))
        try:
            write_report([self.run_dir.path], path)
        except Exception as error:
            self.report(
                f"the report could not be written ({type(error).__name__}: {error}); "
                f"`mmcot report {self.run_dir.path}` tries again"
            )
            return
        self.tracker.parent.log_artifact(path)
