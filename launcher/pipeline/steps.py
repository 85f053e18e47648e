"""The steps of a run: data, then for each stage of the chain its training and the writing of its texts, and evaluate.

A step reads only what the steps before it committed. ``run_pipeline`` runs them in the order of the chain.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from data_shards.atomic_files import commit_folder, commit_json, fingerprint
from data_shards.generated_texts import verified_files
from data_shards.leftovers import describe_leftovers, remove_leftovers
from data_shards.remote_files import is_remote
from data_shards.sources.scienceqa import SPLITS
from launcher.config.chains import EVALUATE, PRETRAINED, Stage
from launcher.config.settings import Settings, SettingsError
from launcher.data.build import (
    describe_data,
    prepare_data,
    standing_mini_sqa,
)
from launcher.evaluation.predictions import read_problems
from launcher.generation.inputs import generation_inputs
from launcher.generation.task_lines import describe_summary
from launcher.generation.text_tasks import write_split_texts
from launcher.pipeline.attempt import Attempt
from launcher.pipeline.scoring import flat_scores, score_split, show_scores
from launcher.pipeline.training_job import plan_training
from launcher.runs.exported import describe_export
from launcher.runs.journal import Journal, JournalReader
from launcher.runs.places import earlier_places
from launcher.runs.progress import GenerationLine, Phase, TrainingLine, describe_retrieval, showing
from launcher.runs.run_dir import RunError, missing_data
from launcher.stages.data_folder import DataFolder, tokenizer_fingerprint
from launcher.stages.jobs import GenerationJob, TrainJob
from launcher.tracking.run_log import RunLog
from launcher.training.identity import settle_identity
from launcher.training.launch import launch_training
from mmcot.texts.sample import Sample

OTHER_PICTURES = "other-pictures"  # in the names of what is answered with the pictures of other questions


@dataclasses.dataclass(frozen=True)
class WriteJob:
    """A training that is written into a file for torchrun instead of being run.

    ``use_gpu`` is the setting as given: "auto" is decided on the machine of the ranks.
    """

    step: str
    path: Path
    use_gpu: bool | str


class Steps:
    """The steps of one attempt."""

    def __init__(self, attempt: Attempt, write_job: WriteJob | None = None) -> None:
        self.attempt, self.settings, self.run_dir, self.report = (
            attempt,
            attempt.settings,
            attempt.run_dir,
            attempt.report,
        )
        self._write_job = write_job
        self.folder: DataFolder

    def run(self, step: str) -> None:
        """Run a step of the chain, unless it is done."""
        chain = self.settings.chain
        if step == "data":
            self.data()
        elif step == EVALUATE:
            self.evaluate()
        elif stage := chain.stage_of_step(step):
            self._train(stage)
        elif stage := chain.writer_of(step):
            self._write_texts(stage, step)
        else:
            self._take_texts(step)

    def data(self) -> None:
        """Build or open the data folder and log what it holds."""
        marker, given = self.run_dir.marker("data"), self.settings.data.shards_dir
        if marker is None:
            self.attempt.begin_step("data")
        elif given and not is_remote(given) and not Path(given).exists() and earlier_places(self.run_dir.path):
            raise RunError(missing_data(self.run_dir, given))  # not built at a place that the run has left
        self.folder = standing_mini_sqa(self.settings, self.run_dir.data_marker()) or prepare_data(
            self.settings, self.report, to_train=True
        )
        if not self.folder.is_remote:  # other runs use it too: nothing but files of dead processes
            for line in describe_leftovers(*remove_leftovers(self.folder.path, staging=False)):
                self.report(line)
        settle_identity(self.run_dir, self.settings, self.folder)  # before MLflow's thread reads the id

        def run(child: RunLog) -> dict[str, Any]:
            for line in describe_data(self.folder):
                self.report(line)
            counts = {f"num_{split}": float(n) for split, n in self.folder.text["num_samples"].items()}
            for split, pictures in (self.folder.features or {}).get("counts", {}).items():
                counts |= {f"{split}_{name}": float(value) for name, value in pictures.items()}
            child.log_scores(counts)
            for log in (child, self.attempt.tracker.parent):
                self._log_data(log, {"train": "training", "val": "validation", "test": "test"})
            child.log_params({"shards_dir": self.folder.location, **self.folder.fingerprints()})
            return self.folder.fingerprints() | {"shards_dir": self.folder.location}

        outputs = self.attempt.run_step("data", self.folder.fingerprints(), run)
        if marker is not None and outputs.get("shards_dir") != self.folder.location:
            self.run_dir.mark_done("data", {**marker, "outputs": {**outputs, "shards_dir": self.folder.location}})

    def _write_texts(self, stage: Stage, text: str) -> None:
        """Write a stage's text for every question of all splits."""
        inputs = self._generation_inputs(stage, self.attempt.outputs[stage.step]) | self._fingerprints_of_read(stage)

        def run(child: RunLog) -> dict[str, Any]:
            return {text: self._generate(stage, SPLITS, self.run_dir.texts(text), inputs, child, step=text)}

        self.attempt.run_step(text, inputs, run)

    def _take_texts(self, text: str) -> None:
        """Copy given texts, after each file is verified by their manifest."""
        given = self.settings.given_texts
        if given is None:
            raise SettingsError(f"run.chain {self.settings.run.chain!r} needs answer.rationales, a folder of {text}")
        source = Path(given) if self.run_dir.marker(text) is None else self.run_dir.texts(text)
        files = verified_files(source)
        readers = [stage for stage in self.settings.chain.stages if text in stage.reads]
        on_gold = all(self.settings.trains_on_gold(stage.name) for stage in readers)
        for split in ("val", "test") if on_gold else SPLITS:
            found = sum(file["num_samples"] for name, file in files.items() if name.startswith(f"{split}/"))
            if found != (wanted := self.folder.text["num_samples"][split]):
                raise SettingsError(
                    f"answer.rationales {source} has {found:,} rationales of {split}, the data has {wanted:,} "
                    "questions; write them with `mmcot rationales --split all` for this data folder, or train on gold "
                    "ones: answer.rationale_source=gold"
                )
        inputs = self.folder.fingerprints() | {f"given_{text}": fingerprint(files)}

        def run(child: RunLog) -> dict[str, Any]:
            staging = self.run_dir.path / f".staging-{text}"
            shutil.rmtree(staging, ignore_errors=True)  # of a process that was killed
            shutil.copytree(source, staging)
            commit_folder(staging, self.run_dir.texts(text))
            return {text: fingerprint(files)}

        self.attempt.run_step(text, inputs, run)

    def evaluate(self) -> None:
        """Answer the validation and test splits, score both and offer the models to the registry."""
        stage = self.settings.chain.stages[-1]
        answer_inputs = self._generation_inputs(stage, self.attempt.outputs[stage.step])
        answer_inputs |= self._fingerprints_of_read(stage)
        problems = {split: read_problems(self.folder.path, split) for split in ("val", "test")}  # test comes last

        def run(child: RunLog) -> dict[str, Any]:
            parts = self.run_dir.predictions / "parts"
            self._generate(stage, tuple(problems), parts, answer_inputs, child, step=EVALUATE)
            reports = {
                split: score_split(
                    self.attempt,
                    self.folder,
                    split,
                    problems[split],
                    parts,
                    child,
                    predictions=self.run_dir.predictions / f"{split}.jsonl",
                    scores=self.run_dir.scores(split),
                )
                for split in problems
            }
            flat = {name: value for split in reports for name, value in flat_scores(reports[split]).items()}
            if self.settings.generation.other_pictures:
                flat |= self._score_other_pictures(problems["test"], answer_inputs, child)
            child.log_scores(flat, trained_by=stage.step)
            self.attempt.tracker.parent.log_scores(flat)
            self._log_data(child, {"val": "validation", "test": "test"})
            # With given texts the run lacks the model that writes them: it cannot predict alone.
            if self.settings.tracking.register_models and not self.settings.chain.given:
                self._register(reports["val"]["accuracy"]["AVG"])
            return {"scores": reports}

        outputs = self.attempt.run_step("evaluate", answer_inputs, run)
        for split, scores in outputs["scores"].items():
            show_scores(scores, problems[split], self.folder, self.report)

    def _score_other_pictures(
        self, problems: dict[str, Sample], inputs: dict[str, Any], child: RunLog
    ) -> dict[str, float | None]:
        """Answer the test questions with the pictures of others; returns the scores by their names in MLflow."""
        folder, name = self.run_dir.predictions, f"test-{OTHER_PICTURES}"
        self.report(Phase("  the same questions with the pictures of others"))
        self._generate(
            self.settings.chain.stages[-1],
            ("test",),
            folder / f"parts-{OTHER_PICTURES}",
            inputs | {OTHER_PICTURES: True},
            child,
            step=EVALUATE,
            other_pictures=True,
        )
        scores = score_split(
            self.attempt,
            self.folder,
            "test",
            problems,
            folder / f"parts-{OTHER_PICTURES}",
            child,
            predictions=folder / f"{name}.jsonl",
            scores=self.run_dir.scores_with_other_pictures,
        )
        accuracy = scores["accuracy"]
        self.report(f"  with the pictures of other questions: AVG {accuracy['AVG']:.2f}")
        return {f"test_other_pictures_accuracy_{column}": value for column, value in accuracy.items()}

    def evaluate_split(self, split: str, folder: Path) -> dict[str, Any]:
        """Answer and score a split once more, from the run's committed texts, into a folder of its own.

        Raises:
            RunError: the run has no texts of the split that its answering stage reads.
        """
        stage, step = self.settings.chain.stages[-1], f"{EVALUATE}-{split}"
        for text in stage.reads:
            if not any(name.startswith(f"{split}/") for name in verified_files(self.run_dir.texts(text))):
                raise RunError(f"{self.run_dir.texts(text)} has no {text} of {split}; give another --split")
        inputs = self._generation_inputs(stage, self.attempt.outputs[stage.step]) | self._fingerprints_of_read(stage)
        problems = read_problems(self.folder.path, split)
        with self.attempt.tracker.step(step) as child:
            parts = folder / "parts"
            self._generate(stage, (split,), parts, inputs, child, step=step)
            scores = score_split(
                self.attempt,
                self.folder,
                split,
                problems,
                parts,
                child,
                predictions=folder / "predictions.jsonl",
                scores=folder / "scores.json",
            )
            child.log_scores(flat_scores(scores))
            self._log_data(child, {split: "evaluation"})
        show_scores(scores, problems, self.folder, self.report)
        return scores

    def _train(self, stage: Stage) -> None:
        """Train a stage; its model is registered if it writes a text that later stages read."""
        inputs = self.folder.fingerprints() | self._fingerprints_of_read(stage)
        inputs |= {"tokenizer": tokenizer_fingerprint(self.settings, self.folder.path)}
        lineage = self._start_of(stage)
        inputs |= lineage
        if self._write_job and self._write_job.step == stage.step:
            self._write_training(stage, inputs, self._write_job)
            return

        def run(child: RunLog) -> dict[str, Any]:
            job = self._plan_training(stage, inputs)
            self.attempt.open_ray()
            self.report(Phase(f"  starting {_workers(self.settings)}"))
            line = TrainingLine(job.num_steps, self.report)
            child.log_params(lineage)
            child.follow(self.run_dir.journal(stage.name).name)
            child.follow(f"{stage.step}-system-*.jsonl")
            self._log_data(child, {"train": "training", "val": "validation"})
            with showing(self.run_dir.journal(stage.name), line.show):
                launch_training(job, report=self.report)
            self.report(f"  {line.goodput()}")
            outputs = describe_export(stage.name, self.run_dir.model(stage.name))
            self._log_trained(stage, outputs, child)
            is_last = stage is self.settings.chain.stages[-1]
            alone = stage.writes and not stage.reads and not self.settings.chain.given  # it can write by itself
            if alone and not is_last and self.settings.tracking.register_models:
                child.log_model(
                    name=stage.name,
                    stages=[stage.name],
                    alias="candidate",
                    accuracy=None,
                    data=self._data_fingerprint(),
                    tags={"mmcot.model_sha256": outputs[f"{stage.name}_model"]},
                    exports={stage.name: outputs},
                )
            return outputs

        self.attempt.run_step(stage.step, inputs, run)

    def _log_trained(self, stage: Stage, outputs: dict[str, Any], child: RunLog) -> None:
        """Log the trained model, with its settings and its last losses."""
        spec, training = self.settings.stage(stage.name), self.settings.training_of(stage.name)
        child.log_trained(
            stage.name,
            params={
                "chain": self.settings.run.chain,
                "format": spec.format,
                "pretrained": self.settings.model.pretrained,
                "fusion": self.settings.model.fusion,
                "features": self.settings.data.features,
                "learning_rate": training.learning_rate,
                "global_batch_size": training.global_batch_size,
                "seed": self.settings.run.seed,
            },
            tags={"mmcot.model_sha256": outputs[f"{stage.name}_model"], "mmcot.data": self._data_fingerprint()},
        )
        last: dict[str, float] = {}
        for point in JournalReader(self.run_dir.journal(stage.name)).read():
            last |= point["metrics"]
        names = ("loss", "validation_loss", "retrieval_at_1")
        child.log_scores({f"final_{name}": last[name] for name in names if name in last}, trained_by=stage.step)
        if "retrieval_at_1" in last:
            self.report(f"  {describe_retrieval(last)}")

    def _start_of(self, stage: Stage) -> dict[str, Any]:
        """The earlier stage that a training continues, and the sha256 of its model; empty where there is none."""
        if stage.starts_from == PRETRAINED:
            return {}
        trained = self.attempt.outputs[self.settings.chain.stage(stage.starts_from).step]
        return {"starts_from": stage.starts_from, "starts_from_sha256": trained[f"{stage.starts_from}_model"]}

    def _plan_training(self, stage: Stage, inputs: dict[str, Any]) -> TrainJob:
        return plan_training(self.attempt, self.folder, stage.name, inputs, texts=self._texts_read(stage))

    def _write_training(self, stage: Stage, inputs: dict[str, Any], write_job: WriteJob) -> None:
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
        self,
        stage: Stage,
        splits: tuple[str, ...],
        output_dir: Path,
        inputs: dict[str, Any],
        child: RunLog,
        *,
        step: str,
        other_pictures: bool = False,
    ) -> str:
        """Write a stage's texts for some splits; returns the fingerprint of all files."""
        job = GenerationJob(
            stage=stage.name,
            settings=self.settings,
            model_dir=str(self.run_dir.model(stage.name).absolute()),
            shards_dir=self.folder.location,
            output_dir=str(output_dir.absolute()),
            texts=self._texts_read(stage),
            run_dir=str(self.run_dir.path.absolute()),
            attempt=self.attempt.number,
            step=step,
            other_pictures=other_pictures,
        )
        child.follow(f"{step}-metrics.jsonl")
        child.follow(f"{step}-system-*.jsonl")
        with GenerationLine(self.report, Journal(self.run_dir.journal_of(step))) as line:
            files, summary = write_split_texts(
                job, splits, inputs, open_ray=self._open_workers, report=line.show, say=self.report
            )
        child.log_scores({key: float(value) for key, value in summary.items()})
        self.report(describe_summary(summary))
        return fingerprint(files)

    def _open_workers(self) -> None:
        self.attempt.open_ray()
        self.report(Phase(f"  starting {_workers(self.settings)}, each with the model"))

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
        """Register the models under the answering stage's name; the alias follows accuracy on the validation split."""
        chain, writing = self.settings.chain, self.settings.chain.writing
        self.attempt.tracker.parent.log_model(
            name=chain.stages[-1].name,
            stages=[stage.name for stage in writing],
            alias="champion",
            accuracy=accuracy,
            data=self._data_fingerprint(),
            tags={
                "mmcot.chain": self.settings.run.chain,
                **{
                    f"mmcot.{name}": value
                    for step in chain.steps[1:]
                    for name, value in self.attempt.outputs.get(step, {}).items()
                    if name != "files"
                },
            },
            exports={stage.name: self.attempt.outputs[stage.step] for stage in writing},
        )

    def _generation_inputs(self, stage: Stage, model: dict[str, Any]) -> dict[str, Any]:
        spec = self.settings.stage(stage.name)
        return {
            f"{stage.name}_model": model[f"{stage.name}_model"],
            **self.folder.fingerprints(),
            "format": spec.format,
            "max_source_tokens": spec.max_source_tokens,
            "max_target_tokens": spec.max_target_tokens,
            "use_caption": self.settings.data.use_caption,
            **generation_inputs(self.settings),
        }

    def _fingerprints_of_read(self, stage: Stage) -> dict[str, Any]:
        """The fingerprints of the texts that a stage reads, by the texts' names."""
        return {name: value for text in stage.reads for name, value in self.attempt.outputs[text].items()}

    def _texts_read(self, stage: Stage) -> dict[str, str]:
        """The folders of the texts that a stage reads."""
        return {text: str(self.run_dir.texts(text).absolute()) for text in stage.reads}


def _workers(settings: Settings) -> str:
    count = settings.cluster.num_workers
    return f"{count} worker{'s' * (count > 1)}"
