"""The steps of a run: data, train-rationale, rationales, train-answer, evaluate.

A step reads only what the steps before it committed. ``run_pipeline`` calls them in the order of the chain.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from data_shards.atomic_files import commit_folder, commit_json, fingerprint
from data_shards.generated_texts import list_tasks, read_rationales, verified_files
from data_shards.sources.scienceqa import SPLITS
from launcher.config.settings import SettingsError
from launcher.data.build import (
    describe_data,
    prepare_data,
    require_all_splits,
    standing_mini_sqa,
)
from launcher.evaluation.predictions import read_problems, score, write_predictions
from launcher.evaluation.tables import ceiling_rows, format_table
from launcher.generation.inputs import generation_inputs
from launcher.generation.text_tasks import describe_summary, write_split_texts
from launcher.pipeline.attempt import Attempt
from launcher.pipeline.training_job import plan_training
from launcher.runs.exported import describe_export
from launcher.runs.journal import Journal
from launcher.runs.progress import GenerationLine, TrainingLine, showing
from launcher.stages.data_folder import DataFolder, tokenizer_fingerprint
from launcher.stages.jobs import GenerationJob, TrainJob
from launcher.tracking.run_log import RunLog
from launcher.training.identity import settle_identity
from launcher.training.launch import launch_training


@dataclasses.dataclass(frozen=True)
class WriteJob:
    """A training that is written into a file for torchrun instead of being run.

    ``use_gpu`` is the setting as given: "auto" is decided on the machine of the ranks.
    """

    step: str
    path: Path
    use_gpu: bool | str


class Steps:
    """The steps of one attempt, a method each."""

    def __init__(self, attempt: Attempt, write_job: WriteJob | None = None) -> None:
        self.attempt, self.settings, self.run_dir, self.report = (
            attempt,
            attempt.settings,
            attempt.run_dir,
            attempt.report,
        )
        self._write_job = write_job
        self.folder: DataFolder

    def data(self) -> None:
        """Build or open the data folder and log what it holds."""
        self.folder = standing_mini_sqa(self.settings, self.run_dir.data_marker()) or prepare_data(
            self.settings, self.report
        )
        require_all_splits(self.folder)
        settle_identity(self.run_dir, self.settings, self.folder)  # before MLflow's thread reads the id

        def run(child: RunLog) -> dict[str, Any]:
            for line in describe_data(self.folder):
                self.report(line)
            counts = {f"num_{split}": float(n) for split, n in self.folder.text["num_samples"].items()}
            for split, pictures in (self.folder.features or {}).get("counts", {}).items():
                counts |= {f"{split}_{name}": float(value) for name, value in pictures.items()}
            child.log_scores(counts)
            self._log_data(child, {"train": "training", "val": "validation", "test": "test"})
            child.log_params({"shards_dir": self.folder.location, **self.folder.fingerprints()})
            return self.folder.fingerprints() | {"shards_dir": self.folder.location}

        self.attempt.run_step("data", self.folder.fingerprints(), run)

    def train_rationale(self) -> None:
        """Train stage one."""
        self._train("rationale", self.folder.fingerprints())

    def rationales(self) -> None:
        """Write the rationales of all splits, or copy those that were given."""
        if not self.settings.chain.has_rationale_stage:
            given = self.settings.answer.rationales
            if given is None:
                raise SettingsError(f"run.chain {self.settings.run.chain!r} needs answer.rationales, a folder of them")
            self._take_rationales(Path(given))
            return
        inputs = self._generation_inputs("rationale", self.attempt.outputs["train-rationale"])

        def run(child: RunLog) -> dict[str, Any]:
            return {"rationales": self._generate("rationale", SPLITS, self.run_dir.rationales, inputs, child)}

        self.attempt.run_step("rationales", inputs, run)

    def _take_rationales(self, source: Path) -> None:
        """Copy given rationales, after each file is verified by their manifest."""
        files = verified_files(source)
        needed = ("val", "test") if self.settings.answer.rationale_source == "gold" else SPLITS
        for split in needed:
            given = sum(file["num_samples"] for name, file in files.items() if name.startswith(f"{split}/"))
            if given != (wanted := self.folder.text["num_samples"][split]):
                raise SettingsError(
                    f"answer.rationales {source} has {given:,} rationales of {split}, the data has {wanted:,} "
                    "questions; write them with `mmcot rationales --split all` for this data folder, or train on gold "
                    "ones: answer.rationale_source=gold"
                )
        inputs = self.folder.fingerprints() | {"given_rationales": fingerprint(files)}

        def run(child: RunLog) -> dict[str, Any]:
            staging = self.run_dir.path / ".staging-rationales"
            shutil.rmtree(staging, ignore_errors=True)  # of a process that was killed
            shutil.copytree(source, staging)
            commit_folder(staging, self.run_dir.rationales)
            return {"rationales": fingerprint(files)}

        self.attempt.run_step("rationales", inputs, run)

    def train_answer(self) -> None:
        """Train stage two, or the one stage of a chain that has one."""
        self._train("answer", self.folder.fingerprints() | self.attempt.outputs.get("rationales", {}))

    def evaluate(self) -> None:
        """Answer the validation and test splits, score both and offer the models to the registry."""
        answer_inputs = self._generation_inputs(
            "answer", self.attempt.outputs["train-answer"]
        ) | self.attempt.outputs.get("rationales", {})
        problems = {split: read_problems(self.folder.path, split) for split in ("val", "test")}  # test comes last

        def run(child: RunLog) -> dict[str, Any]:
            parts = self.run_dir.predictions / "parts"
            self._generate("answer", tuple(problems), parts, answer_inputs, child)
            reports = {}
            for split in problems:
                path = self.run_dir.predictions / f"{split}.jsonl"
                lines = write_predictions(
                    path,
                    parts_dir=parts,
                    tasks=list_tasks(self.folder.path, [split], **self._task_size()),
                    problems=problems[split],
                    chain=self.settings.chain,
                    rationales=read_rationales(self.run_dir.rationales, split)
                    if self._rationales_dir("answer")
                    else {},
                )
                reports[split] = score(lines, problems[split], split=split, gold_reasons=self.settings.gold_reasons)
                commit_json(self.run_dir.scores(split), reports[split])
                child.log_artifact(path, "predictions")
                child.log_artifact(self.run_dir.scores(split))
            flat = {name: value for split in reports for name, value in _flatten(reports[split]).items()}
            child.log_scores(flat)
            self.attempt.tracker.parent.log_scores(flat)
            self._log_data(child, {"val": "validation", "test": "test"})
            # With given rationales the run has no stage-one model: its answer model cannot predict alone.
            if self.settings.tracking.register_models and self.settings.run.chain != "given-rationales":
                self._register(reports["val"]["accuracy"]["AVG"])
            return {"scores": reports}

        outputs = self.attempt.run_step("evaluate", answer_inputs, run)
        for split, scores in outputs["scores"].items():
            rows = {f"{split}, {scores['num_questions']:,} questions": scores["accuracy"]}
            rows |= ceiling_rows(problems[split], self.folder.ceilings) if split == "test" else {}
            self.report(f"\n{format_table(rows)}")
            rationale = "".join(
                f"{name} {scores['rationale'][key]:.2f}   "
                for name, key in (("ROUGE-L", "rougeL"), ("BLEU-4", "bleu4"))
                if scores["rationale"][key] is not None
            )
            self.report(f"{rationale}answers that could not be read {scores['parse_failure_rate']:.2f}%")

    def _train(self, stage: str, inputs: dict[str, Any]) -> None:
        inputs = inputs | {"tokenizer": tokenizer_fingerprint(self.settings, self.folder.path)}
        if self._write_job and self._write_job.step == f"train-{stage}":
            self._write_training(stage, inputs, self._write_job)
            return

        def run(child: RunLog) -> dict[str, Any]:
            job = self._plan_training(stage, inputs)
            self.attempt.open_ray()
            line = TrainingLine(job.num_steps, self.report)
            child.follow(self.run_dir.journal(stage).name)
            child.follow(f"train-{stage}-system-*.jsonl")
            self._log_data(child, {"train": "training", "val": "validation"})
            with showing(self.run_dir.journal(stage), line.show):
                launch_training(job, report=self.report)
            self.report(f"  {line.goodput()}")
            outputs = describe_export(stage, self.run_dir.model(stage))
            if stage == "rationale" and self.settings.tracking.register_models:
                child.log_model(
                    name="rationale",
                    stages=["rationale"],
                    alias="candidate",
                    accuracy=None,
                    data=self._data_fingerprint(),
                    tags={"mmcot.model_sha256": outputs["rationale_model"]},
                    exports={"rationale": outputs},
                )
            return outputs

        self.attempt.run_step(f"train-{stage}", inputs, run)

    def _plan_training(self, stage: str, inputs: dict[str, Any]) -> TrainJob:
        return plan_training(self.attempt, self.folder, stage, inputs, rationales_dir=self._rationales_dir(stage))

    def _write_training(self, stage: str, inputs: dict[str, Any], write_job: WriteJob) -> None:
        """Write the job for torchrun; the same command without --write-job then uses the trained model."""
        self.attempt.verify_models()
        job = self._plan_training(stage, inputs)
        cluster = job.settings.cluster.model_copy(update={"use_gpu": write_job.use_gpu})
        commit_json(
            write_job.path,
            dataclasses.replace(job, settings=job.settings.model_copy(update={"cluster": cluster})).to_json(),
        )
        self.attempt.num_run += 1
        path = write_job.path
        self.report(
            f"{path}: run it with `torchrun --nproc-per-node N -m launcher.rank {path}`; then the same command without "
            "--write-job uses the trained model"
        )

    def _generate(
        self, stage: str, splits: tuple[str, ...], output_dir: Path, inputs: dict[str, Any], child: RunLog
    ) -> str:
        """Write a stage's texts for some splits; returns the fingerprint of all files."""
        job = GenerationJob(
            stage=stage,
            settings=self.settings,
            model_dir=str(self.run_dir.model(stage).absolute()),
            shards_dir=self.folder.location,
            output_dir=str(output_dir.absolute()),
            rationales_dir=self._rationales_dir(stage),
            run_dir=str(self.run_dir.path.absolute()),
            attempt=self.attempt.number,
        )
        step = "rationales" if stage == "rationale" else "evaluate"
        child.follow(f"{step}-metrics.jsonl")
        child.follow(f"{step}-system-*.jsonl")
        with GenerationLine(self.report, Journal(self.run_dir.journal_of(step))) as line:
            files, summary = write_split_texts(
                job, splits, inputs, open_ray=self.attempt.open_ray, report=line.show, say=self.report
            )
        child.log_scores({key: float(value) for key, value in summary.items()})
        self.report(describe_summary(summary))
        return fingerprint(files)

    def _log_data(self, child: RunLog, contexts: dict[str, str]) -> None:
        for split, context in contexts.items():
            child.log_dataset(
                name=f"{Path(self.folder.location).name}/{split}",
                digest=self._data_fingerprint(),
                source=self.folder.location,
                context=context,
                profile={"num_questions": self.folder.text["num_samples"][split]},
            )

    def _data_fingerprint(self) -> str:
        return fingerprint(self.folder.fingerprints())

    def _register(self, accuracy: float | None) -> None:
        """Register the models as a version of ``answer``; the alias follows accuracy on the validation split."""
        self.attempt.tracker.parent.log_model(
            name="answer",
            stages=list(self.settings.chain.stages),
            alias="champion",
            accuracy=accuracy,
            data=self._data_fingerprint(),
            tags={
                "mmcot.chain": self.settings.run.chain,
                **{
                    f"mmcot.{name}": value
                    for step in ("train-answer", "train-rationale", "rationales")
                    for name, value in self.attempt.outputs.get(step, {}).items()
                    if name != "files"
                },
            },
            exports={stage: self.attempt.outputs[f"train-{stage}"] for stage in self.settings.chain.stages},
        )

    def _generation_inputs(self, stage: str, model: dict[str, Any]) -> dict[str, Any]:
        spec = getattr(self.settings, stage)
        return {
            f"{stage}_model": model[f"{stage}_model"],
            **self.folder.fingerprints(),
            "format": spec.format,
            "max_source_tokens": spec.max_source_tokens,
            "max_target_tokens": spec.max_target_tokens,
            "use_caption": self.settings.data.use_caption,
            **generation_inputs(self.settings),
        }

    def _rationales_dir(self, stage: str) -> str | None:
        """The folder of the rationales that a stage reads, if it reads any."""
        reads = stage == "answer" and self.settings.chain.reads_rationales
        return str(self.run_dir.rationales.absolute()) if reads else None

    def _task_size(self) -> dict[str, int]:
        return {"task_samples": self.settings.generation.task_samples}


def _flatten(scores: dict[str, Any]) -> dict[str, float | None]:
    split = scores["split"]
    flat = {f"{split}_accuracy_{column}": value for column, value in scores["accuracy"].items()}
    flat |= {f"{split}_{name}": value for name, value in scores["rationale"].items()}
    return flat | {f"{split}_parse_failure_rate": scores["parse_failure_rate"]}
