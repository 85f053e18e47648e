"""The names of settings, and the nearest one to a name that is not known."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import pydantic

from launcher.config.field_types import is_section
from launcher.config.settings import Settings


def setting_names(section: type[pydantic.BaseModel] = Settings, prefix: str = "") -> list[str]:
    """Return the dotted names of all settings."""
    names = []
    for key, field in section.model_fields.items():
        optional = () if get_origin(field.annotation) is dict else get_args(field.annotation)
        kinds: list[Any] = [kind for kind in (field.annotation, *optional) if is_section(kind)]
        names += setting_names(kinds[0], f"{prefix}{key}.") if kinds else [f"{prefix}{key}"]
    return names


def section_note(name: str) -> str:
    """Return " `mmcot config explain NAME` ...", where the name is that of a section, or ""."""
    is_one = any(each.startswith(f"{name}.") for each in setting_names())
    return f" `mmcot config explain {name}` lists the settings of the section {name}" if is_one else ""


def nearest_file(path: Path) -> str:
    """Return " did you mean X?" with the file of a similar name in the same folder, or "" where there is none."""
    names = os.listdir(path.parent) if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    return f" did you mean {path.parent / close[0]}?" if close else ""


def nearest_name(name: str, names: Sequence[str], *, cutoff: float = 0.6) -> str:
    """Return " did you mean X?" with the nearest of the names, or "" where none is near."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=cutoff)
    return f" did you mean {close[0]}?" if close else ""


# Names of other libraries, and short forms, for the last part of a setting's name.
_OTHER_NAMES = {
    "lr": "learning_rate",
    "bs": "micro_batch_size",
    "batch_size": "global_batch_size",
    "per_device_train_batch_size": "micro_batch_size",
    "train_batch_size": "global_batch_size",
    "epochs": "num_epochs",
    "num_train_epochs": "num_epochs",
    "steps": "num_steps",
    "max_steps": "num_steps",
    "wd": "weight_decay",
    "warmup": "warmup_steps",
    "lr_scheduler_type": "schedule",
    "max_grad_norm": "clip_norm",
    "grad_clip": "clip_norm",
    "save_steps": "checkpoint_every",
    "eval_steps": "validate_every",
    "logging_steps": "log_every",
    "save_total_limit": "keep_checkpoints",
    "gradient_checkpointing": "activation_checkpointing",
    "bf16": "precision",
    "fp16": "precision",
    "gradient_accumulation_steps": "global_batch_size",
    "max_seq_length": "max_source_tokens",
    "train_file": "path",
    "dataset": "path",
    "tracking_uri": "uri",
    "mlflow_tracking_uri": "uri",
    "experiment_name": "experiment",
    "dtype": "precision",
    "gpus": "num_workers",
    "num_gpus": "num_workers",
    "workers": "num_workers",
    "output_dir": "dir",
    "model_name_or_path": "pretrained",
    "backbone": "pretrained",
    "max_new_tokens": "max_target_tokens",
    "max_length": "max_source_tokens",
    "image_features": "features",
    "seed": "seed",
}


_OTHER_SECTIONS = {"mlflow": "tracking", "zero_optimization": "training", "optimizer": "training", "ray": "cluster"}


def nearest_setting(name: str) -> str:
    """Return " did you mean X?" with the nearest setting by its whole path, or "" where none is near.

    A name of another library, a short form or a right key in another section counts before a similar spelling.
    """
    names = setting_names()
    if re.match(r"stages\.[^.]+\.", name):  # the settings of a stage are the same for all
        own = name.rpartition(".")[0]
        names += [f"{own}.{each.rpartition('.')[2]}" for each in names if each.startswith("answer.")]
    section, _, given = name.rpartition(".")
    key = _OTHER_NAMES.get(given, given)
    same = [each for each in names if each.rpartition(".")[2] == key]
    if same:
        own = [each for each in same if each.startswith(f"{section}.")] if section else []
        common = [each for each in same if each.startswith("training.")]
        value = "=bf16" if given in ("bf16", "fp16") else ""
        stages = [each for each in same if each.startswith(("rationale.", "answer."))]  # each has one, as num_epochs
        return f" did you mean {' and '.join((own or common)[:1] or stages or same[:1])}{value}?"
    sections = list(dict.fromkeys(each.rpartition(".")[0] for each in names if "." in each))
    if not section:
        if name in _OTHER_SECTIONS:
            return f" did you mean {_OTHER_SECTIONS[name]}?"
        return nearest_name(name, sections) or nearest_name(name, [each.rpartition(".")[2] for each in names])
    own = {each.rpartition(".")[2]: each for each in names if each.startswith(f"{section}.")}
    close = difflib.get_close_matches(given, own, n=1, cutoff=0.6)
    return f" did you mean {own[close[0]]}?" if close else nearest_name(name, names, cutoff=0.8)
