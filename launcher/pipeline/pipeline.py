"""The whole job, step by step: data, train-rationale, rationales, train-answer, evaluate.

A step is done if its marker stands and its inputs are still those; running again goes on
at the first step that is not. Ray and MLflow are opened at the first step that needs them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_shards.generated_texts import list_tasks, read_rationales, verified_files
from data_shards.sources.scienceqa import SPLITS
from data_shards.atomic_files import commit_folder, commit_json, fingerprint
from launcher.cluster.ray_session import ray_session
from launcher.config.loading import read_deepspeed, tracking_uri
from launcher.data.build import DataFolder, describe_data, prepare_data, require_all_splits, standing_mini_sqa
from launcher.runs.exported import describe_export, verify_model
from launcher.cluster.gpus import with_device
from launcher.runs.signals import sigterm_stops
from launcher.training.identity import claim_store, run_facts, settle_identity, store_root
from launcher.stages.jobs import GenerationJob, TrainJob
from launcher.runs.journal import Journal
from launcher.tracking.mlflow_sync import is_everything_told
from launcher.pipeline.preflight import check_machine, check_settings, fetch_pretrained
from launcher.runs.progress import GenerationLine, TrainingLine, showing
from launcher.runs.run_dir import RunDir, RunError, claim_settings, owned
from launcher.config.settings import Settings, SettingsError
from launcher.tracking.run_log import RunLog, Tracker, open_tracker

LAST_STEP = "evaluate"
Report = Callable[[str], None]


def run_pipeline(
    settings: Settings, *, until: str = LAST_STEP, report: Report = print, write_job: Path | None = None, parent_key: str | None = None,
    arm: str | None = None,
) -> RunDir:
    """Run all steps up to ``until`` that are not done yet.

    Args:
        parent_key: of the MLflow run that this one is a child of.
        arm: of a tuning's, where this run is a trial of one.
        write_job: write the training step ``until`` into this file, for torchrun, instead of running it.

    Raises:
        SettingsError: the folder holds a run of other settings, or the chain has no such step.
        RunError: another process runs it, or a finished step's inputs have changed.
        Stopped: it was asked to stop (SIGTERM, Ctrl-C, SIGHUP); the same command goes on.
    """
    steps = settings.chain.steps
    if until not in steps:
        raise SettingsError(f"run.chain {settings.run.chain!r} has no step {until!r}; it has {', '.join(steps)}")
    check_settings(settings)
    check_machine(settings)
    tracking_uri(settings)  # refused before any work, if it must be
    if settings.model.pretrained:
        fetch_pretrained(settings.model.pretrained)
    run_dir = RunDir(settings.run_dir)
    run_dir.path.mkdir(parents=True, exist_ok=True)
    claim_settings(run_dir, settings)
    with sigterm_stops(), owned(run_dir) as attempt, contextlib.ExitStack() as resources:
        asked = settings.cluster.use_gpu
        if not write_job or asked == "auto":
            settings = with_device(settings, run_dir, report, keep=not write_job)
        pipeline = _Pipeline(settings, run_dir, attempt, report, resources, (until, write_job, asked) if write_job else None, parent_key, arm)
        for name in steps[: steps.index(until) + 1]:
            getattr(pipeline, name.replace("-", "_"))()
        if until == LAST_STEP and (pipeline.num_run or not is_everything_told(run_dir)):
            pipeline.write_report()  # also where the last attempt was ended after the last marker
        if not pipeline.num_run:
            report(f"{run_dir.path} is finished up to step {until!r}; there is nothing to do")
    return run_dir


class _Pipeline:
    """The steps of one attempt and what they share."""

    def __init__(
        self, settings: Settings, run_dir: RunDir, attempt: int, report: Report, resources: contextlib.ExitStack,
        write_job: tuple[str, Path, bool | str] | None, parent_key: str | None = None, arm: str | None = None,
    ) -> None:  # fmt: skip
        self.settings, self.run_dir, self.attempt, self.report = settings, run_dir, attempt, report
        self._resources, self._write_job, self._parent_key, self._arm = resources, write_job, parent_key, arm
        self._tracker: Tracker | None = None
        self._ray_open = False
        self.num_run = 0
        self.folder: DataFolder
        self.outputs: dict[str, dict[str, Any]] = {}

    def data(self) -> None:
        self.folder = standing_mini_sqa(self.settings, self.run_dir.data_marker()) or prepare_data(self.settings, self.report)
        require_all_splits(self.folder)
        settle_identity(self.run_dir, self.settings, self.folder)  # before MLflow's thread asks for an id

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

        self._step("data", self.folder.fingerprints(), run)

    def train_rationale(self) -> None:
        self._train("rationale", self.folder.fingerprints())

    def rationales(self) -> None:
        if not self.settings.chain.has_rationale_stage:
            self._take_rationales(Path(self.settings.answer.rationales))
            return
        inputs = self._generation_inputs("rationale", self.outputs["train-rationale"])

        def run(child: RunLog) -> dict[str, Any]:
            return {"rationales": self._generate("rationale", SPLITS, self.run_dir.rationales, inputs, child)}

        self._step("rationales", inputs, run)

    def _take_rationales(self, source: Path) -> None:
        """Copy rationales that were written before, each file checked against their manifest."""
        files = verified_files(source)
        needed = ("val", "test") if self.settings.answer.rationale_source == "gold" else SPLITS
        for split in needed:
            given = sum(file["num_samples"] for name, file in files.items() if name.startswith(f"{split}/"))
            if given != (wanted := self.folder.text["num_samples"][split]):
                raise SettingsError(
                    f"answer.rationales {source} has {given:,} rationales of {split}, the data has {wanted:,} questions; write them with "
                    "`mmcot rationales --split all` for this data folder, or train on gold ones: answer.rationale_source=gold"
                )
        inputs = self.folder.fingerprints() | {"given_rationales": fingerprint(files)}

        def run(child: RunLog) -> dict[str, Any]:
            staging = self.run_dir.path / ".staging-rationales"
            shutil.rmtree(staging, ignore_errors=True)  # of a process that was killed
            shutil.copytree(source, staging)
            commit_folder(staging, self.run_dir.rationales)
            return {"rationales": fingerprint(files)}

        self._step("rationales", inputs, run)

    def train_answer(self) -> None:
        self._train("answer", self.folder.fingerprints() | self.outputs.get("rationales", {}))

    def evaluate(self) -> None:
        from launcher.evaluation.predictions import ceiling_rows, format_table, read_problems, score, write_predictions

        answer_inputs = self._generation_inputs("answer", self.outputs["train-answer"]) | self.outputs.get("rationales", {})
        problems = {split: read_problems(self.folder.path, split) for split in ("val", "test")}  # test comes last

        def run(child: RunLog) -> dict[str, Any]:
            parts = self.run_dir.predictions / "parts"
            self._generate("answer", tuple(problems), parts, answer_inputs, child)
            reports = {}
            for split in problems:
                path = self.run_dir.predictions / f"{split}.jsonl"
                lines = write_predictions(
                    path, parts_dir=parts, tasks=list_tasks(self.folder.path, [split], **self._task_size()),
                    problems=problems[split], chain=self.settings.chain,
                    rationales=read_rationales(self.run_dir.rationales, split) if self._rationales_dir("answer") else {},
                )  # fmt: skip
                reports[split] = score(lines, problems[split], split=split, gold_reasons=self.settings.gold_reasons)
                commit_json(self.run_dir.scores(split), reports[split])
                child.log_artifact(path, "predictions")
                child.log_artifact(self.run_dir.scores(split))
            flat = {name: value for split in reports for name, value in _flatten(reports[split]).items()}
            child.log_scores(flat)
            self.tracker.parent.log_scores(flat)
            self._log_data(child, {"val": "validation", "test": "test"})
            if self.settings.tracking.register_models and self.settings.run.chain != "given-rationales":  # half a predictor
                self._register(reports["val"]["accuracy"]["AVG"])
            return {"scores": reports}

        outputs = self._step("evaluate", answer_inputs, run)
        for split, scores in outputs["scores"].items():
            rows = {f"{split}, {scores['num_questions']:,} questions": scores["accuracy"]}
            rows |= ceiling_rows(problems[split], self.folder.ceilings) if split == "test" else {}
            self.report(f"\n{format_table(rows)}")
            rationale = "".join(
                f"{name} {scores['rationale'][key]:.2f}   "
                for name, key in (("ROUGE-L", "rougeL"), ("BLEU-4", "bleu4")) if scores["rationale"][key] is not None
            )  # fmt: skip
            self.report(f"{rationale}answers that could not be read {scores['parse_failure_rate']:.2f}%")

    def write_report(self) -> None:
        """Write the page for people; a run whose page fails is still a run."""
        from launcher.report.render import write_report

        path = self.run_dir.report
        try:
            write_report([self.run_dir.path], path)
        except Exception as error:
            self.report(f"the report could not be written ({type(error).__name__}: {error}); `mmcot report {self.run_dir.path}` tries again")
            return
        self.tracker.parent.log_artifact(path)

    @property
    def tracker(self) -> Tracker:
        if self._tracker is None:
            self._tracker = self._resources.enter_context(
                open_tracker(self.settings, self.run_dir, report=self.report, parent_key=self._parent_key, arm=self._arm)
            )
        return self._tracker

    def _open_ray(self) -> None:
        if not self._ray_open:
            self._resources.enter_context(ray_session(self.settings.cluster))
            self._ray_open = True

    def _step(self, name: str, inputs: dict[str, Any], run: Callable[[RunLog], dict[str, Any]]) -> dict[str, Any]:
        """Run a step unless its marker stands; returns its outputs."""
        marker = self.run_dir.marker(name)
        if marker is not None:
            if marker["inputs"] != inputs:
                changed = next(key for key in inputs if marker["inputs"].get(key) != inputs[key])
                raise RunError(
                    f"{self.run_dir.path}: step {name!r} was done with {changed} = {marker['inputs'].get(changed)!r}, now "
                    f"it is {inputs[changed]!r}; start another run.dir, or restore what it was done with"
                )
            self.outputs[name] = marker["outputs"]
            return marker["outputs"]
        self._verify_models()
        steps = self.settings.chain.steps
        self.report(f"\n[{steps.index(name) + 1}/{len(steps)}] {name}")
        started = time.time()
        with self.tracker.step(name) as child:
            outputs = run(child)
            self.run_dir.check_attempt(self.attempt)
            seconds = round(time.time() - started, 1)
            child.log_scores({"step_seconds": seconds})
        self.run_dir.check_attempt(self.attempt)
        self.run_dir.mark_done(  # after its end is told: what is marked is never looked at again
            name,
            {"step": name, "inputs": inputs, "outputs": outputs, "attempt": self.attempt, "seconds": seconds},
        )
        self.report(f"{name} took {seconds:.0f} s")
        self.outputs[name] = outputs
        self.num_run += 1
        return outputs

    def _verify_models(self) -> None:
        """Hold the models of finished steps against their markers, before a step that may use or publish them."""
        for stage in self.settings.chain.stages:
            if self.run_dir.marker(f"train-{stage}") is not None:
                verify_model(self.run_dir.model(stage))

    def _train(self, stage: str, inputs: dict[str, Any]) -> None:
        from launcher.stages.samples import tokenizer_fingerprint

        inputs = inputs | {"tokenizer": tokenizer_fingerprint(self.settings, self.folder.path)}
        if self._write_job and self._write_job[0] == f"train-{stage}":
            _, path, asked = self._write_job
            self._verify_models()
            job = self._train_job(stage, inputs)
            elsewhere = job.settings.cluster.model_copy(update={"use_gpu": asked})  # "auto" is decided where the ranks run
            commit_json(path, dataclasses.replace(job, settings=job.settings.model_copy(update={"cluster": elsewhere})).to_json())
            self.num_run += 1
            self.report(f"{path}: run it with `torchrun --nproc-per-node N -m launcher.rank {path}`; then the same command without --write-job takes the model over")
            return

        def run(child: RunLog) -> dict[str, Any]:
            from launcher.training.launch import launch_training

            job = self._train_job(stage, inputs)
            self._open_ray()
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
                    name="rationale", stages=["rationale"], alias="candidate", accuracy=None, data=self._data_fingerprint(),
                    tags={"mmcot.model_sha256": outputs["rationale_model"]}, exports={"rationale": outputs},
                )  # fmt: skip
            return outputs

        self._step(f"train-{stage}", inputs, run)

    def _train_job(self, stage: str, inputs: dict[str, Any]) -> TrainJob:
        """Count tokens, fix the number of steps and say what was cut off."""
        from launcher.stages.token_lengths import LengthsOf, cached_lengths, read_lengths
        from launcher.stages.samples import make_plan

        settings, spec = self.settings, getattr(self.settings, stage)
        rationales_dir = self._rationales_dir(stage)
        cache = self.run_dir.lengths if self.folder.is_remote else self.folder.path / "lengths"
        paths, lengths, shards = {}, {}, {}
        for split in ("train", "val"):
            whose = LengthsOf(settings, stage, split, self.folder.location, rationales_dir)
            samples = whose.open()
            depends = inputs | spec.model_dump() | {"split": split, "use_caption": settings.data.use_caption}
            depends |= {"rationale_format": settings.rationale.format}  # gold rationales have its form
            paths[split] = str(cached_lengths(whose, samples, cache, depends).absolute())
            lengths[split], shards[split] = read_lengths(paths[split]), samples.reader.shard_of_sample
            for side in ("source", "target"):
                if cut := int((lengths[split][f"{side}_cut"] > 0).sum()):
                    limit = getattr(spec, f"max_{side}_tokens")
                    self.report(f"{cut:,} of {len(samples):,} {side}s of {split} were cut at {limit} tokens ({stage})")
        plan = make_plan(settings, lengths["train"], shards["train"], epoch=0)
        num_steps = spec.num_steps or math.ceil(spec.num_epochs * plan.num_steps)
        workers = settings.cluster.num_workers
        self.report(
            f"{num_steps:,} steps of {settings.training.global_batch_size} questions, {plan.num_steps:,} an epoch, "
            f"padding factor {plan.padding_factor():.2f}, imbalance of {workers} workers {plan.imbalance(workers):.2f}"
        )
        return TrainJob(
            stage=stage, settings=_for_workers(settings), run_dir=str(self.run_dir.path.absolute()),
            shards_dir=self.folder.location, lengths=paths, num_steps=num_steps, attempt=self.attempt,
            rationales_dir=rationales_dir, run_facts=self._run_facts(rationales_dir),
        )  # fmt: skip

    def _run_facts(self, rationales_dir: str | None) -> dict[str, str]:
        """Whose checkpoints a training writes; its folder of the store is claimed for this run."""
        facts = run_facts(self.settings, self.folder, self.run_dir.identity(), rationales_dir=rationales_dir)
        root = store_root(self.settings, facts)
        if root and (note := claim_store(root, self.run_dir, facts["run_id"])):
            self.report(f"note: {note}")
        return facts

    def _generate(
        self, stage: str, splits: tuple[str, ...], output_dir: Path, inputs: dict[str, Any], child: RunLog
    ) -> str:
        """Write a stage's texts for some splits; returns the fingerprint of all files."""
        from launcher.generation.text_tasks import describe_summary, write_split_texts

        job = GenerationJob(
            stage=stage, settings=self.settings, model_dir=str(self.run_dir.model(stage).absolute()),
            shards_dir=self.folder.location, output_dir=str(output_dir.absolute()),
            rationales_dir=self._rationales_dir(stage),
            run_dir=str(self.run_dir.path.absolute()), attempt=self.attempt,
        )  # fmt: skip
        step = "rationales" if stage == "rationale" else "evaluate"
        child.follow(f"{step}-metrics.jsonl")
        child.follow(f"{step}-system-*.jsonl")
        with GenerationLine(self.report, Journal(self.run_dir.journal_of(step))) as line:
            files, summary = write_split_texts(job, splits, inputs, open_ray=self._open_ray, report=line.show, say=self.report)
        child.log_scores({key: float(value) for key, value in summary.items()})
        self.report(describe_summary(summary))
        return fingerprint(files)

    def _log_data(self, child: RunLog, contexts: dict[str, str]) -> None:
        for split, context in contexts.items():
            child.log_dataset(
                name=f"{Path(self.folder.location).name}/{split}", digest=self._data_fingerprint(), source=self.folder.location,
                context=context, profile={"num_questions": self.folder.text["num_samples"][split]},
            )  # fmt: skip

    def _data_fingerprint(self) -> str:
        return fingerprint(self.folder.fingerprints())

    def _register(self, accuracy: float | None) -> None:
        """Offer the pair of models as a version of ``answer``; it is chosen by the validation split."""
        self.tracker.parent.log_model(
            name="answer", stages=list(self.settings.chain.stages), alias="champion", accuracy=accuracy, data=self._data_fingerprint(),
            tags={
                "mmcot.chain": self.settings.run.chain,
                **{
                    f"mmcot.{name}": value
                    for step in ("train-answer", "train-rationale", "rationales") for name, value in self.outputs.get(step, {}).items() if name != "files"
                },
            },
            exports={stage: self.outputs[f"train-{stage}"] for stage in self.settings.chain.stages},
        )  # fmt: skip

    def _generation_inputs(self, stage: str, model: dict[str, Any]) -> dict[str, Any]:
        spec = getattr(self.settings, stage)
        return {
            f"{stage}_model": model[f"{stage}_model"], **self.folder.fingerprints(), "format": spec.format,
            "max_source_tokens": spec.max_source_tokens, "max_target_tokens": spec.max_target_tokens,
            "use_caption": self.settings.data.use_caption, **generation_inputs(self.settings),
        }  # fmt: skip

    def _rationales_dir(self, stage: str) -> str | None:
        """Where a stage's rationales lie, if it reads any."""
        reads = stage == "answer" and self.settings.chain.reads_rationales
        return str(self.run_dir.rationales.absolute()) if reads else None

    def _task_size(self) -> dict[str, int]:
        return {"task_samples": self.settings.generation.task_samples}


def generation_inputs(settings: Settings) -> dict[str, Any]:
    """What generated texts depend on, beside the model, the data and the prompts."""
    generation = settings.generation
    inputs = {"batch_size": generation.batch_size, "task_samples": generation.task_samples, "precision": generation.precision}
    if generation.temperature > 0:
        inputs |= {"temperature": generation.temperature, "top_p": generation.top_p, "seed": settings.run.seed}
    return inputs


def _for_workers(settings: Settings) -> Settings:
    """Workers run in folders of their own: nothing they read may depend on the current one."""
    model, training = settings.model, settings.training
    if model.pretrained is not None and Path(model.pretrained).is_dir():
        model = model.model_copy(update={"pretrained": str(Path(model.pretrained).absolute())})
    if training.deepspeed is not None:
        training = training.model_copy(update={"deepspeed": read_deepspeed(training.deepspeed)})
    return settings.model_copy(update={"model": model, "training": training})


def _flatten(scores: dict[str, Any]) -> dict[str, float | None]:
    split = scores["split"]
    flat = {f"{split}_accuracy_{column}": value for column, value in scores["accuracy"].items()}
    flat |= {f"{split}_{name}": value for name, value in scores["rationale"].items()}
    return flat | {f"{split}_parse_failure_rate": scores["parse_failure_rate"]}
