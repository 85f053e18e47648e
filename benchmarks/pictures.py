"""The pictures of README and docs, drawn from a finished run of the demo.

    python benchmarks/pictures.py runs/demo [--out docs/images]

quiz.png is drawn from the run's predictions; the others are screenshots of its report and of MLflow in Chromium.
mlflow-trials.png needs a tuning too (`mmcot tune --preset demo`, in runs/demo-tune).
"""

from __future__ import annotations

import argparse
import base64
import subprocess
import sys
import textwrap
import time
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))
import matplotlib

matplotlib.use("Agg")
from chromium import Chromium
from matplotlib import pyplot
from PIL import Image

from data_shards.atomic_files import read_json
from data_shards.text_lines import read_lines
from launcher.evaluation.predictions import read_problems
from launcher.report.questions import find_pictures
from launcher.runs.mlflow_pages import compare_page
from launcher.runs.run_dir import PARENT, RunDir, shards_dir_of
from launcher.runs.run_settings import settings_of

PORT = 5017
# MLflow opens a panel beside every page.
CLOSE_ASSISTANT = (
    "[...document.querySelectorAll('button')].filter((b) => /close/i.test(b.ariaLabel ?? '')).forEach((b) => b.click())"
)


def draw_quiz(run_dir: RunDir, path: Path) -> None:
    """Four test questions of different skills, each with its rationale and its answer."""
    problems = read_problems(shards_dir_of(run_dir), "test")
    pictures = find_pictures(run_dir, settings_of(run_dir), Path(shards_dir_of(run_dir)))
    chosen: dict[str, dict] = {}
    for line in read_lines(run_dir.predictions / "test.jsonl"):
        if problems[line["qid"]].images:
            chosen.setdefault(problems[line["qid"]].skill, line)
    figure, axes = pyplot.subplots(4, 2, figsize=(9, 7), width_ratios=(1, 4), layout="constrained")
    for (left, right), line in zip(axes, list(chosen.values())[:4], strict=True):
        problem = problems[line["qid"]]
        left.imshow(Image.open(pictures(problem)[0]).convert("RGB"), interpolation="nearest")
        left.axis("off")
        right.axis("off")
        choices = "  ".join(f"({chr(65 + index)}) {choice}" for index, choice in enumerate(problem.choices))
        answered = "unread"
        if line["prediction"] is not None:
            verdict = "right" if line["prediction"] == problem.answer else "wrong"
            answered = f"{problem.choices[line['prediction']]}  ({verdict})"
        lines = [
            (f"Asked: {problem.question} {problem.hint}  {choices}", "#404040"),
            (f"Wrote: {line['rationale']}", "#00b050"),
            (f"Answered: {line['answer_text']}  {answered}", "#0055aa"),
        ]
        for place, (text, colour) in zip((0.95, 0.5, 0.15), lines, strict=True):
            right.text(0, place, textwrap.fill(text, 84), color=colour, va="top", fontsize=9, transform=right.transAxes)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def show(
    browser: Chromium, address: str, path: Path, *, wait_s: float, height: int = 900, script: str | None = None
) -> None:
    """Save a screenshot of a page after a wait for its drawing."""
    browser.ask(
        "Emulation.setDeviceMetricsOverride", {"width": 1180, "height": height, "deviceScaleFactor": 1, "mobile": False}
    )
    browser.ask("Page.navigate", {"url": address})
    time.sleep(wait_s)
    if script:
        browser.ask("Runtime.evaluate", {"expression": script, "awaitPromise": True})
        time.sleep(1.0)
    path.write_bytes(base64.b64decode(browser.ask("Page.captureScreenshot", {"format": "png"})["data"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    options = parser.parse_args()
    run_dir = RunDir(options.run)
    draw_quiz(run_dir, options.out / "quiz.png")
    command = [sys.executable, "-m", "launcher", "mlflow", "up", "--runs", str(options.run.parent), "--port", str(PORT)]
    server = subprocess.Popen(command)
    try:
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=2)
                break
            except OSError:
                time.sleep(1.0)
        state = read_json(run_dir.mlflow_state)
        run_id = state["runs"].get("train-rationale", state["runs"][PARENT])
        with Chromium() as browser:
            report = run_dir.report.absolute().as_uri()
            show(
                browser,
                report,
                options.out / "report.png",
                wait_s=2.0,
                script="document.querySelector('#questions').scrollIntoView()",
            )
            show(
                browser,
                report,
                options.out / "looking.png",
                wait_s=2.0,
                script="document.querySelector('#looking').scrollIntoView()",
            )
            address = (
                f"http://127.0.0.1:{PORT}/#/experiments/1/runs/{run_id}/model-metrics?workflowType=machine_learning"
            )
            show(browser, address, options.out / "mlflow.png", wait_s=15.0, script=CLOSE_ASSISTANT)
            address = f"http://127.0.0.1:{PORT}/#/experiments/1/models?workflowType=machine_learning"
            show(browser, address, options.out / "mlflow-models.png", wait_s=10.0, height=500, script=CLOSE_ASSISTANT)
            trials = sorted(Path(f"{options.run}-tune").glob("trials/*/mlflow.json"))
            if trials:
                ids = [read_json(path)["runs"][PARENT] for path in trials]
                address = compare_page(f"http://127.0.0.1:{PORT}", experiment_id="1", run_ids=ids)
                show(browser, address, options.out / "mlflow-trials.png", wait_s=15.0, script=CLOSE_ASSISTANT)
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
