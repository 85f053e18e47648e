"""Running a command of the published system, and writing its output files.

run = parse_command(["--prompt_format", "QCM-E"], num_gpus=0)     # launcher/compat/published_commands.py
run_reference(run)                                                # returns the folder of its files
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from data_shards.atomic_files import commit_json, read_json, sha256_of_file
from data_shards.generated_texts import close_output, list_tasks, open_output, write_task
from data_shards.text_lines import read_lines
from launcher.compat.published_commands import DEVIATIONS, ReferenceRun
from launcher.config.chains import ANSWER, GIVEN_FIELD, RATIONALE
from launcher.config.loading import dump_settings, parse_settings
from launcher.config.settings import Settings, SettingsError
from launcher.data.build import prepare_data
from launcher.evaluation.predictions import read_problems
from launcher.generation.standalone import write_model_texts
from launcher.pipeline.pipeline import run_pipeline
from launcher.runs.exported import verify_model
from launcher.runs.run_dir import RunDir
from mmcot.errors import MissingFileError
from mmcot.metrics.metrics import score_report
from mmcot.models.checkpoint_import import import_checkpoint
from mmcot.texts.answers import parse_answer
from mmcot.texts.prompts import build_pair
from mmcot.texts.sample import Sample
from mmcot.vision.encoder_kinds import ENCODERS

Report = Callable[[str], None]


def run_reference(run: ReferenceRun, *, report: Report = print) -> Path:
    """Run it and write the files of the published system; returns their folder. Run again to resume."""
    report(f"these settings (also in {run.folder / 'mmcot.yaml'}):\n{_shown(run.settings)}")
    for name in run.deviations:
        report(f"differs from the published system: {DEVIATIONS[name]}")
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "mmcot.yaml").write_text(dump_settings(run.settings), encoding="utf-8")
    settings = run.settings
    data = prepare_data(settings, report)
    reads: dict[str, Path] = {}
    if run.rationales:
        reads = {"rationales": run.folder / "mmcot-rationales"}
        _import_rationales(run.rationales, data.path, reads["rationales"], settings)
    run_dir = RunDir(settings.run_dir)
    if run.evaluate_dir is None:
        stage = settings.chain.stage(run.stage)
        run_pipeline(settings, until=stage.step, report=report)
        model_dir = run_dir.model(run.stage)
        verify_model(model_dir)
        for path in model_dir.iterdir():
            shutil.copy2(path, run.folder / path.name)
        reads |= {text: run_dir.texts(text) for text in stage.reads}
    else:
        model_dir = _model_to_evaluate(run.evaluate_dir, settings.data.features)
    texts_dir = run.folder / "mmcot-texts"
    write_model_texts(
        settings,
        run.stage,
        model_dir,
        data.location,
        ("val", "test"),
        texts_dir,
        texts=reads,
        report=report,
    )
    for split, name in (("val", "eval"), ("test", "test")):
        problems = read_problems(data.path, split)
        texts = {
            line["qid"]: line[run.stage].strip()
            for task in list_tasks(data.path, [split], task_samples=settings.generation.task_samples)
            for line in read_lines(texts_dir / task.file_name)
        }
        content = _predictions(run, problems, texts, with_scores=split == "test")
        if split == "test" or run.stage == RATIONALE:  # as in the published system
            commit_json(run.folder / f"predictions_ans_{name}.json", content)
            report(f"{run.folder / f'predictions_ans_{name}.json'}: {len(texts):,} texts")
        if "scores" in content:
            report(f"  {content['scores']}")
    return run.folder


def _shown(settings: Settings) -> str:
    """The settings that differ from the defaults."""
    defaults = parse_settings({RATIONALE: {"num_epochs": 1}, ANSWER: {"num_epochs": 1}}).model_dump()
    lines = []
    for section, values in settings.model_dump(exclude={"extensions"}).items():
        changed = {name: value for name, value in values.items() if value != defaults[section][name]}
        lines += [f"  {section}.{name} = {value}" for name, value in changed.items()]
    return "\n".join(lines)


def _import_rationales(files: Mapping[str, Path], shards_dir: Path, out: Path, settings: Settings) -> None:
    """Write texts in the order of a split, with their questions' ids, as a folder of rationales."""
    inputs = {"predictions": {split: sha256_of_file(path) for split, path in files.items()}}
    if out.exists() and read_json(out / "manifest.json")["inputs"] != inputs:
        shutil.rmtree(out)  # written by an earlier call from other files
    open_output(out, inputs)
    described: dict[str, dict[str, Any]] = {}
    for split, path in files.items():
        texts, problems = _texts(path), list(read_problems(shards_dir, split))
        if len(texts) != len(problems):
            raise SettingsError(
                f"{path} has {len(texts):,} texts without ids, split {split} has {len(problems):,} questions; "
                "give the file written on this split"
            )
        written = dict(zip(problems, texts, strict=True))
        at = 0
        for task in list_tasks(shards_dir, [split], task_samples=settings.generation.task_samples):
            lines = [
                {"qid": qid, GIVEN_FIELD: written[qid], "num_tokens": 0, "finish": "eos"}
                for qid in problems[at : at + task.num_samples]
            ]
            at += task.num_samples
            described[task.file_name] = {
                "num_samples": len(lines),
                "sha256": sha256_of_file(write_task(out, task, lines)),
            }
    close_output(out, files=described, summary={"num_samples": sum(file["num_samples"] for file in described.values())})


def _texts(path: Path) -> list[str]:
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist; it is written by the command that trains the rationales")
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("preds"), list):
        raise SettingsError(f'{path} holds no predictions; expected {{"preds": [text, ...]}}')
    return [str(text) for text in content["preds"]]


def _model_to_evaluate(folder: Path, features: str | None) -> Path:
    """The folder of ``--evaluate_dir``, or its converted copy if it is a checkpoint of the published system."""
    if not (folder / "config.json").is_file():
        raise MissingFileError(f"--evaluate_dir {folder} holds no model (no config.json)")
    if "vision_num_patches" in read_json(folder / "config.json"):
        return folder
    imported = folder / "mmcot-model"
    if not (imported / "config.json").exists():
        shutil.rmtree(imported, ignore_errors=True)
        shape = ENCODERS[features].published_shape if features in ENCODERS else None
        import_checkpoint(folder, imported, vision_num_patches=shape[0] if shape else None)
    return imported


def _predictions(
    run: ReferenceRun, problems: Mapping[str, Sample], texts: Mapping[str, str], *, with_scores: bool
) -> dict[str, Any]:
    spec = run.settings.stage(run.stage)
    labels = {
        qid: build_pair(problem, spec.format, use_caption=run.settings.data.use_caption)[1]
        for qid, problem in problems.items()
    }
    content: dict[str, Any] = {"preds": [texts[qid] for qid in problems], "labels": list(labels.values())}
    if not with_scores:
        return content
    predictions = {qid: parse_answer(texts[qid], len(problem.choices)) for qid, problem in problems.items()}
    scores = score_report(problems, predictions, split="test", rationales=dict(texts), references=labels)
    columns = {
        "NAT": "natural",
        "SOC": "social",
        "LAN": "language",
        "TXT": "has_text",
        "IMG": "has_image",
        "NO": "no_context",
        "G1-6": "grade_1_6",
        "G7-12": "grade_7_12",
        "AVG": "average",
    }
    answer = {
        f"acc_{name}": None if scores["accuracy"][column] is None else f"{scores['accuracy'][column]:.2f}"
        for column, name in columns.items()
    }
    rationale = {
        "bleu1": scores["rationale"]["bleu1"],
        "bleu4": scores["rationale"]["bleu4"],
        "rouge": scores["rationale"]["rougeL"],
        "similariry": None,
    }
    num_fail = sum(prediction is None for prediction in predictions.values())
    return {
        "num_fail": num_fail,
        "scores": {"answer": answer if run.stage == ANSWER else None, "rationale": rationale},
        **content,
    }
