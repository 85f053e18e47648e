"""All data of a report's page: the facts of each run, and the questions and pictures that runs share.

    data = collect([Path("runs/demo")], num_pictures=200, num_looked_at=24)
    data["runs"][0]["said"]["test"]["4402"]["right"]          # True
    data["sets"][0]["test"][0]["question"]                    # "Which tense does the sentence use?"

Runs of the same questions share one set (``run["set"]`` is its number), so that their
answers can be compared one by one.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_shards.manifest import read_manifest
from data_shards.sources.question_set import Picture
from launcher.config.settings import Settings
from launcher.evaluation.predictions import read_problems
from launcher.evaluation.tables import ceiling_rows
from launcher.report.attention import grid_of, look_at_questions
from launcher.report.questions import (
    break_down,
    choose_qids,
    describe_question,
    embed_picture,
    find_pictures,
    find_shards,
    judge,
    read_outputs,
)
from launcher.report.run_facts import SPLITS, read_run
from launcher.runs.run_dir import RunDir
from launcher.runs.run_settings import read_run_settings
from mmcot.metrics.metrics import COLUMNS, PUBLISHED
from mmcot.metrics.table import METRICS
from mmcot.texts.sample import Sample

FREE_PICTURE_BYTES = (
    500_000  # more than ``num_pictures`` are embedded up to this size, so that tiny pictures are all included
)
SCIENCE_QA_TESTS = 4241  # questions of ScienceQA's test split; the published scores are on these


def collect(run_dirs: Sequence[Path], *, num_pictures: int, num_looked_at: int) -> dict[str, Any]:
    """All data of the page."""
    for folder in run_dirs:
        read_run_settings(folder)  # raises before any work for the others
    book = PageData(num_pictures)
    runs = [book.add_run(folder, num_looked_at) for folder in run_dirs]
    _label_runs(runs)
    return {
        "written_ms": int(1000 * datetime.datetime.now(datetime.UTC).timestamp()),
        "runs": runs,
        "sets": [book.sets[key] for key in book.sets],
        "pictures": list(book.pictures),
        **_published(),
    }


class PageData:
    """Question sets and pictures that several runs share on one page."""

    def __init__(self, num_pictures: int) -> None:
        self.num_pictures = num_pictures
        self.sets: dict[str, dict[str, Any]] = {}
        self.pictures: dict[str, int] = {}

    def add_run(self, folder: Path, num_looked_at: int) -> dict[str, Any]:
        """The facts of one run; adds its questions and pictures to the page."""
        facts, run_dir, settings = read_run(folder), RunDir(folder), read_run_settings(folder)
        facts |= {"set": None, "said": {}, "groups": {}, "ceilings": {}, "looking": None}
        try:
            shards_dir = find_shards(run_dir, settings)
        except (RuntimeError, ValueError, OSError) as error:  # such as a store that this machine cannot reach
            facts["missing"].append(f"The data folder cannot be read: {error}")
            return facts
        if shards_dir is None:
            if run_dir.marker("data"):
                facts["missing"].append(
                    "The data folder does not exist: questions, choices and gold rationales cannot be shown."
                )
            return facts
        problems = self._add_questions(facts, run_dir, settings, shards_dir)
        self._add_ceilings(facts, problems, shards_dir)
        self._embed_pictures(facts, run_dir, settings, problems, shards_dir)
        try:
            facts["looking"] = _look(facts, run_dir, settings, problems, shards_dir, num_looked_at)
        except (RuntimeError, ValueError, OSError) as error:  # the page is written without this part
            facts["missing"].append(f"Attention could not be measured: {error}")
        return facts

    def _add_questions(
        self, facts: dict[str, Any], run_dir: RunDir, settings: Settings, shards_dir: Path
    ) -> dict[str, dict[str, Sample]]:
        problems = {split: read_problems(shards_dir, split) for split in SPLITS}
        key = read_manifest(shards_dir / "text")["fingerprint"]
        if key not in self.sets:
            self.sets[key] = {
                split: [describe_question(problem, settings.gold_reasons(problem)) for problem in part.values()]
                for split, part in problems.items()
            }
        facts["set"] = list(self.sets).index(key)
        for split, part in problems.items():
            facts["said"][split] = judge(read_outputs(run_dir, split, settings.chain), part, settings.gold_reasons)
            facts["groups"][split] = break_down(part, facts["said"][split])
        return problems

    def _add_ceilings(self, facts: dict[str, Any], problems: dict[str, dict[str, Sample]], shards_dir: Path) -> None:
        ceilings = read_manifest(shards_dir / "text")["ceilings"]
        facts["ceilings"] = {split: ceiling_rows(part, ceilings) for split, part in problems.items() if part}
        facts["is_mini_sqa"], facts["is_science_qa"] = (
            ceilings is not None,
            ceilings is None and len(problems["test"]) == SCIENCE_QA_TESTS,
        )

    def _embed_pictures(
        self,
        facts: dict[str, Any],
        run_dir: RunDir,
        settings: Settings,
        problems: dict[str, dict[str, Sample]],
        shards_dir: Path,
    ) -> None:
        pictures_of = find_pictures(run_dir, settings, shards_dir)
        if pictures_of is None:
            facts["missing"].append(
                "The data set does not exist, or the shards were not built from it: pictures are not available."
            )
            return
        questions = list(self.sets.values())[facts["set"]]
        for split, part in problems.items():
            outputs = facts["said"][split]
            shown = [qid for qid, problem in part.items() if problem.images]
            ordered = choose_qids(
                shown,
                lambda qid, outputs=outputs: outputs.get(qid, {}).get("right") is False,
                len(shown) if self.num_pictures else 0,
            )
            by_qid, size_bytes = {question["qid"]: question for question in questions[split]}, 0
            for number, qid in enumerate(ordered):
                if number >= self.num_pictures and size_bytes >= FREE_PICTURE_BYTES:
                    break
                if by_qid[qid]["picture"] is None:
                    size_bytes += self._embed(pictures_of(part[qid]), by_qid[qid])

    def _embed(self, pictures: Sequence[Picture], question: dict[str, Any]) -> int:
        """Embed a question's picture; returns the bytes it adds."""
        uri = embed_picture(pictures, f"question {question['qid']}")
        if uri is None:
            question["picture_absent"] = True
            return 0
        is_new = uri not in self.pictures
        question["picture"] = self.pictures.setdefault(uri, len(self.pictures))
        return len(uri) if is_new else 0


def _bridge_of(settings: Settings) -> str:
    model = settings.model
    return f"The fusion '{model.fusion}'" if model.inject == "encoder" else f"The resampler '{model.resample}'"


def _look(
    facts: dict[str, Any],
    run_dir: RunDir,
    settings: Settings,
    problems: dict[str, dict[str, Sample]],
    shards_dir: Path,
    limit: int,
) -> dict[str, Any]:
    """The attention of both stages for some test questions, or why there is none."""
    if settings.data.features is None:
        return {"why": "This run reads text alone: it has no fusion, so no attention over pictures."}
    outputs = facts["said"]["test"]
    shown = [qid for qid, problem in problems["test"].items() if problem.images]
    qids = choose_qids(shown, lambda qid: outputs.get(qid, {}).get("right") is False, limit)
    ready = {
        stage.name: bool(facts["models"][stage.name]) and all(_is_done(facts, text) for text in stage.reads)
        for stage in settings.chain.stages
    }
    stages = {
        stage: look_at_questions(run_dir, settings, stage, "test", qids, shards_dir=shards_dir)
        for stage, is_ready in ready.items()
        if is_ready and qids
    }
    if stages and not any(stages.values()):
        return {"why": f"{_bridge_of(settings)} has no attention maps, so there is nothing to show."}
    stages = {stage: looks for stage, looks in stages.items() if looks}
    if not stages:
        why = (
            "No test question has a picture."
            if not shown
            else "No model is trained yet."
            if limit
            else "The number of questions to measure was set to 0."
        )
        return {"why": why}
    return {"stages": stages, "grid": grid_of(settings, num_patches=next(iter(stages.values()))[0]["num_patches"])}


def _is_done(facts: dict[str, Any], name: str) -> bool:
    # The default: a step that the chain does not have.
    return next((step["done"] for step in facts["steps"] if step["name"] == name), True)


def _published() -> dict[str, Any]:
    labels = {
        kind: {name: metric.label for name, metric in METRICS.items() if metric.of == kind}
        for kind in ("rationale", "answer")
    }
    return {
        "metrics": labels,
        "columns": list(COLUMNS),
        "published": {name: dict(row) for name, row in PUBLISHED.items()},
    }


def _label_runs(runs: list[dict[str, Any]]) -> None:
    """Give each run a unique label: its name, with the folder or a number where names repeat."""
    names = [run["name"] for run in runs]
    folders = [f"{run['name']} ({run['folder']})" for run in runs]
    for number, run in enumerate(runs):
        run["label"] = run["name"]
        if names.count(run["name"]) > 1:
            run["label"] = folders[number] if folders.count(folders[number]) == 1 else f"{run['name']} [{number + 1}]"
