r"""The published system's own commands, run by this one.

    mmcot reference -- --model allenai/unifiedqa-t5-base --user_msg rationale --img_type detr \
        --bs 8 --output_len 512 --prompt_format QCM-E

The options of its ``main.py`` become settings, the run is in ``<its folder>/mmcot``, and the output
files have their published paths: the model and ``predictions_ans_test.json``,
``predictions_ans_eval.json`` in ``experiments/<user_msg>_<model>_<img_type>_...``. Its errors are not
copied: ``DEVIATIONS``, each printed once, all of them in docs/reference.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from data_shards.atomic_files import commit_json, read_json, sha256_of_file
from data_shards.generated_texts import (
    close_output,
    list_tasks,
    open_output,
    read_lines,
    write_task,
)
from data_shards.sources.question_set import SPLITS
from launcher.config.loading import dump_settings, merge_override, parse_settings
from launcher.config.settings import Settings, SettingsError
from launcher.data.build import prepare_data
from launcher.evaluation.predictions import read_problems
from launcher.generation.standalone import write_model_texts
from launcher.pipeline.pipeline import run_pipeline
from launcher.runs.exported import verify_model
from launcher.runs.run_dir import RunDir
from mmcot.metrics.metrics import score_report
from mmcot.models.checkpoint_import import import_checkpoint
from mmcot.texts.answers import parse_answer
from mmcot.texts.problem import Problem
from mmcot.texts.prompts import build_pair, split_format

DEVIATIONS: Mapping[str, str] = MappingProxyType(
    {
        "padding": "padding is not trained on: labels there are ignored (the published code trains on them)",
        "generate": "texts are always generated; without --use_generate the published predictions come from a pass "
        "that reads the gold text",
        "join": "rationales are joined with questions by id; the published code joins them by the order of lists",
        "gold": "stage two trains on gold rationales in the form that stage one learns, so that training and test read "
        "the same form",
        "leak": "no --eval_le and --test_le: the published code would read gold rationales in evaluation; stage one is "
        "trained first and writes them",
        "unread": "an answer that cannot be read is wrong and counted; the published code guesses one of five letters "
        "at random",
        "last": "the last checkpoint is the model, whether --final_eval is given or not; validation losses are "
        "reported during the training",
        "folder": "without a GPU the folder's name has --bs itself; the published code multiplies it by the number of "
        "GPUs, zero, and writes bs0",
        "captions": "--caption_file is read only with --use_caption; the published code always needs it",
        "vit": "--img_type vit is accepted; the published option list lacks it",
        "memory": "--eval_acc has no effect: predictions are written to disk as they are made",
        "once": "the test split is generated once; the published code generates it twice",
    }
)
_CHAINS = {"A": "answer", "LEA": "reason-then-answer", "EA": "reason-then-answer", "ALE": "answer-then-explain"}
Report = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class ReferenceRun:
    """A command of the published system as a run of this one.

    ``stage`` is the training that writes its predictions, ``folder`` the folder they are written to.
    ``deviations`` are the keys of ``DEVIATIONS`` that concern this command.
    """

    settings: Settings
    stage: str
    folder: Path
    evaluate_dir: Path | None
    rationales: Mapping[str, Path]  # split: a file of predictions, in the order of the split
    deviations: tuple[str, ...]


def parse_command(arguments: Sequence[str], *, num_gpus: int, overrides: Sequence[str] = ()) -> ReferenceRun:
    """Read a command of the published system, as typed after ``python main.py``.

    Args:
        num_gpus: of this machine; one worker per GPU, as in the published system.
        overrides: ``section.key=value`` that override the command.

    Raises:
        SettingsError: an option is unknown, or its value is not allowed.
    """
    options = _parser().parse_args([argument for argument in arguments if argument != "main.py"])
    reads, writes = split_format(options.prompt_format)
    stage = "answer" if "A" in writes else "rationale"
    if (options.eval_le is None) != (options.test_le is None):
        raise SettingsError("--eval_le and --test_le belong together; give both, or neither")
    given = {"val": Path(options.eval_le), "test": Path(options.test_le)} if options.eval_le and "G" in reads else {}
    chain = (
        "two-stage"
        if stage == "rationale" or (reads.endswith("G") and not given)
        else "given-rationales"
        if given
        else _CHAINS.get(writes)
    )
    if chain is None:
        raise SettingsError(
            f"--prompt_format {options.prompt_format} is no format that the published system trains; give QCM-E, "
            "QCM-LE, QCMG-A, QCM-A, QCM-LEA or QCM-ALE"
        )
    if options.evaluate_dir and chain == "two-stage" and stage == "answer":
        raise SettingsError(
            f"--evaluate_dir with --prompt_format {options.prompt_format} reads rationales; "
            "give --eval_le and --test_le"
        )
    folder, spec = _folder(options, num_gpus), {"num_epochs": options.epoch, "max_source_tokens": options.input_len}
    lengths = {"rationale": 512, "answer": 64} | {stage: options.output_len}
    values: dict[str, Any] = {
        "run": {
            "name": re.sub(r"[^A-Za-z0-9_.-]", "-", folder.name),
            "dir": str(folder / "mmcot"),
            "seed": options.seed,
            "chain": chain,
        },
        "data": {
            "path": str(Path(options.data_root) / "scienceqa"),
            "features": options.img_type,
            "use_caption": options.use_caption,
            "captions": options.caption_file if options.use_caption else None,
            **_published_features(options),
            "splits": {split: name for split in SPLITS if (name := getattr(options, f"{split}_split")) != split},
        },
        "model": {"pretrained": options.model},
        "training": {
            "learning_rate": options.lr,
            "micro_batch_size": options.bs,
            "global_batch_size": options.bs * max(1, num_gpus),
            "weight_decay": 0.01,
        },
        "rationale": {
            **spec,
            "format": options.prompt_format if stage == "rationale" else "QCM-E",
            "max_target_tokens": lengths["rationale"],
        },
        "answer": {
            **spec,
            **({"format": options.prompt_format} if stage == "answer" else {}),
            "max_target_tokens": lengths["answer"],
            "rationale_source": "gold",
            "rationales": str(folder / "mmcot-rationales") if given else None,
        },
        "generation": {"batch_size": options.eval_bs},
        "cluster": {"num_workers": max(1, num_gpus), "use_gpu": num_gpus > 0},
        "tracking": {"register_models": False},
    }
    for override in overrides:
        values = merge_override(values, override)
    return ReferenceRun(
        parse_settings(values),
        stage,
        folder,
        Path(options.evaluate_dir) if options.evaluate_dir else None,
        given,
        _deviations(options, chain, stage, num_gpus),
    )


def run_reference(run: ReferenceRun, *, report: Report = print) -> Path:
    """Run it and write the files of the published system; returns their folder. Run again to resume."""
    report(f"these settings (also in {run.folder / 'mmcot.yaml'}):\n{_shown(run.settings)}")
    for name in run.deviations:
        report(f"differs from the published system: {DEVIATIONS[name]}")
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "mmcot.yaml").write_text(dump_settings(run.settings), encoding="utf-8")
    settings = run.settings
    data = prepare_data(settings, report)
    rationales_dir = None
    if run.rationales:
        rationales_dir = run.folder / "mmcot-rationales"
        _import_rationales(run.rationales, data.path, rationales_dir, settings)
    run_dir = RunDir(settings.run_dir)
    if run.evaluate_dir is None:
        until = "train-rationale" if run.stage == "rationale" else "train-answer"
        run_pipeline(settings, until=until, report=report)
        model_dir = run_dir.model(run.stage)
        verify_model(model_dir)
        for path in model_dir.iterdir():
            shutil.copy2(path, run.folder / path.name)
        if run.stage == "answer" and settings.chain.reads_rationales:
            rationales_dir = run_dir.rationales
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
        rationales_dir=rationales_dir,
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
        if split == "test" or run.stage == "rationale":  # as in the published system
            commit_json(run.folder / f"predictions_ans_{name}.json", content)
            report(f"{run.folder / f'predictions_ans_{name}.json'}: {len(texts):,} texts")
        if "scores" in content:
            report(f"  {content['scores']}")
    return run.folder


def _parser() -> argparse.ArgumentParser:
    """The options of the published ``main.py`` with its defaults."""

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> None:
            raise SettingsError(f"{message}; the options are those of the published main.py:\n{self.format_usage()}")

    parser = Parser(prog="main.py", add_help=False)
    for name, default in (
        ("data_root", "data"),
        ("output_dir", "experiments"),
        ("model", "allenai/unifiedqa-t5-base"),
        ("user_msg", "baseline"),
        ("eval_le", None),
        ("test_le", None),
        ("evaluate_dir", None),
        ("caption_file", "data/captions.json"),
        ("prompt_format", "QCM-A"),
    ):
        parser.add_argument(f"--{name}", default=default)
    for name, default in (
        ("epoch", 20),
        ("bs", 16),
        ("input_len", 512),
        ("output_len", 64),
        ("eval_bs", 16),
        ("eval_acc", None),
        ("seed", 42),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--options", type=list, default=list("ABCDE"))
    parser.add_argument("--train_split", default="train", choices=["train", "trainval", "minitrain"])
    parser.add_argument("--val_split", default="val", choices=["test", "val", "minival"])
    parser.add_argument("--test_split", default="test", choices=["test", "minitest"])
    parser.add_argument("--img_type", choices=["detr", "clip", "resnet", "vit"])
    for name in ("use_generate", "final_eval", "use_caption"):
        parser.add_argument(f"--{name}", action="store_true")
    return parser


def _folder(options: argparse.Namespace, num_gpus: int) -> Path:
    """The output folder of the published system."""
    if options.evaluate_dir:
        return Path(options.evaluate_dir)
    model = options.model.replace("/", "-")
    name = (
        f"{options.user_msg}_{model}_{options.img_type}_{options.prompt_format}_lr{options.lr}"
        f"_bs{options.bs * max(1, num_gpus)}_op{options.output_len}_ep{options.epoch}"
    )
    return Path(options.output_dir) / name


def _published_features(options: argparse.Namespace) -> dict[str, str]:
    """The folder of the published features: in the current folder, not in the data folder."""
    return {"vision_features": "vision_features"} if options.img_type and Path("vision_features").is_dir() else {}


def _deviations(options: argparse.Namespace, chain: str, stage: str, num_gpus: int) -> tuple[str, ...]:
    applies = {
        "padding": options.evaluate_dir is None,
        "generate": not options.use_generate,
        "join": chain == "given-rationales",
        "gold": stage == "answer" and chain in ("given-rationales", "two-stage") and options.evaluate_dir is None,
        "leak": stage == "answer" and chain == "two-stage",
        "unread": stage == "answer",
        "last": options.evaluate_dir is None,
        "folder": not num_gpus and options.evaluate_dir is None,
        "captions": not options.use_caption,
        "vit": options.img_type == "vit",
        "memory": options.eval_acc is not None,
        "once": True,
    }
    return tuple(name for name in DEVIATIONS if applies[name])


def _shown(settings: Settings) -> str:
    """The settings that differ from the defaults."""
    defaults = parse_settings({"rationale": {"num_epochs": 1}, "answer": {"num_epochs": 1}}).model_dump()
    lines = []
    for section, values in settings.model_dump().items():
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
                {"qid": qid, "rationale": written[qid], "num_tokens": 0, "finish": "eos"}
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
        raise FileNotFoundError(f"{path} does not exist; it is written by the command that trains the rationales")
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("preds"), list):
        raise SettingsError(f'{path} holds no predictions; expected {{"preds": [text, ...]}}')
    return [str(text) for text in content["preds"]]


def _model_to_evaluate(folder: Path, features: str | None) -> Path:
    """The folder of ``--evaluate_dir``, or its converted copy if it is a checkpoint of the published system."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"--evaluate_dir {folder} holds no model (no config.json)")
    if "vision_num_patches" in read_json(folder / "config.json"):
        return folder
    imported = folder / "mmcot-model"
    if not (imported / "config.json").exists():
        shutil.rmtree(imported, ignore_errors=True)
        shapes = {"detr": 100, "clip": 49, "resnet": 512, "vit": 145}
        import_checkpoint(folder, imported, vision_num_patches=shapes.get(features or ""))
    return imported


def _predictions(
    run: ReferenceRun, problems: Mapping[str, Problem], texts: Mapping[str, str], *, with_scores: bool
) -> dict[str, Any]:
    spec = getattr(run.settings, run.stage)
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
        "scores": {"answer": answer if run.stage == "answer" else None, "rationale": rationale},
        **content,
    }


def num_gpus() -> int:
    """GPUs of this machine, without starting CUDA in this process."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return (
            len([part for part in visible.split(",") if part.strip() and part.strip() != "-1"])
            if Path("/dev/nvidia0").exists()
            else 0
        )
    return len(list(Path("/dev").glob("nvidia[0-9]*")))
