r"""The published system's own commands, run by this one.

    mmcot reference -- --model allenai/unifiedqa-t5-base --user_msg rationale --img_type detr \
        --bs 8 --output_len 512 --prompt_format QCM-E

The options of its ``main.py`` become settings. ``launcher/compat/published_runs.py`` runs them in
``<its folder>/mmcot`` and writes the output files to their published paths: the model and
``predictions_ans_test.json``, ``predictions_ans_eval.json`` in
``experiments/<user_msg>_<model>_<img_type>_...``. Errors of the published system are not copied:
``DEVIATIONS``, each printed once, all of them in docs/reference.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from data_shards.sources.question_set import SPLITS
from launcher.config.chains import ANSWER, RATIONALE
from launcher.config.loading import merge_override, parse_settings
from launcher.config.settings import Settings, SettingsError
from mmcot.texts.prompts import split_format
from mmcot.vision.encoder_kinds import ENCODERS

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
    stage = ANSWER if "A" in writes else RATIONALE
    if (options.eval_le is None) != (options.test_le is None):
        raise SettingsError("--eval_le and --test_le belong together; give both, or neither")
    given = {"val": Path(options.eval_le), "test": Path(options.test_le)} if options.eval_le and "G" in reads else {}
    chain = (
        "two-stage"
        if stage == RATIONALE or (reads.endswith("G") and not given)
        else "given-rationales"
        if given
        else _CHAINS.get(writes)
    )
    if chain is None:
        raise SettingsError(
            f"--prompt_format {options.prompt_format} is no format that the published system trains; give QCM-E, "
            "QCM-LE, QCMG-A, QCM-A, QCM-LEA or QCM-ALE"
        )
    if options.evaluate_dir and chain == "two-stage" and stage == ANSWER:
        raise SettingsError(
            f"--evaluate_dir with --prompt_format {options.prompt_format} reads rationales; "
            "give --eval_le and --test_le"
        )
    folder = _folder(options, num_gpus)
    values = _values(options, folder, stage, chain, num_gpus, has_rationales=bool(given))
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


def _values(
    options: argparse.Namespace, folder: Path, stage: str, chain: str, num_gpus: int, *, has_rationales: bool
) -> dict[str, Any]:
    """The options as nested settings."""
    spec = {"num_epochs": options.epoch, "max_source_tokens": options.input_len}
    lengths = {RATIONALE: 512, ANSWER: 64} | {stage: options.output_len}
    return {
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
        RATIONALE: {
            **spec,
            "format": options.prompt_format if stage == RATIONALE else "QCM-E",
            "max_target_tokens": lengths[RATIONALE],
        },
        ANSWER: {
            **spec,
            **({"format": options.prompt_format} if stage == ANSWER else {}),
            "max_target_tokens": lengths[ANSWER],
            "rationale_source": "gold",
            "rationales": str(folder / "mmcot-rationales") if has_rationales else None,
        },
        "generation": {"batch_size": options.eval_bs},
        "cluster": {"num_workers": max(1, num_gpus), "use_gpu": num_gpus > 0},
        "tracking": {"register_models": False},
    }


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
    parser.add_argument("--img_type", choices=[name for name, kind in ENCODERS.items() if kind.published_shape])
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
        "gold": stage == ANSWER and chain in ("given-rationales", "two-stage") and options.evaluate_dir is None,
        "leak": stage == ANSWER and chain == "two-stage",
        "unread": stage == ANSWER,
        "last": options.evaluate_dir is None,
        "folder": not num_gpus and options.evaluate_dir is None,
        "captions": not options.use_caption,
        "vit": options.img_type == "vit",
        "memory": options.eval_acc is not None,
        "once": True,
    }
    return tuple(name for name in DEVIATIONS if applies[name])


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
