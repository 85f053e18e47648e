"""Opening a saved model: its folder's ``config.json`` names the class.

model = open_model("runs/demo/answer/model")
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from mmcot.errors import InputError
from mmcot.file_kinds import fault_of
from mmcot.pretrained import opening

DEFAULT = "T5ForMultimodalGeneration"

# A class by its name in ``architectures``, and its module.
MODULES = {"T5ForMultimodalGeneration": "mmcot.models.t5", "T5ForImageTextMatching": "mmcot.models.t5_matching"}

# The class that is trained by an objective, where it is not ``DEFAULT``.
_CLASSES = {"matching": "T5ForImageTextMatching"}

# Classes that start from each other's weights: what one of them has and the other has not is new, or left out.
_RELATIVES = ({"T5ForMultimodalGeneration", "T5ForImageTextMatching"},)


def open_model(folder: str | Path, **options: Any) -> Any:
    """Open a model that was exported by a training or written by ``import-checkpoint``.

    Args:
        options: as for ``from_pretrained``, such as ``dtype``.

    Raises:
        InputError: the folder contains no model of a known class, or a file of it is broken.
    """
    name = _name_in(folder)
    try:
        with _no_progress_bar(), opening(folder, "the model"):
            return model_class(name).from_pretrained(folder, trust_remote_code=False, **options)
    except InputError as error:  # of a value in its configuration
        if str(folder) in str(error):
            raise
        raise InputError(f"{error}; restore it").at(Path(folder) / "config.json") from None


def model_class(name: str) -> Any:
    """The class of a name in ``MODULES``."""
    return getattr(import_module(MODULES[name]), name)


def class_name(objective: str) -> str:
    """The name of the class that a training by an objective builds."""
    return _CLASSES.get(objective, DEFAULT)


def check_start(
    name: str,
    pretrained: str,
    *,
    shape: Mapping[str, Any] | None = None,
    media: Mapping[str, Any] | None = None,
    matching: Mapping[str, Any] | None = None,
) -> None:
    """Check that a model of class ``name`` can start from the weights of ``pretrained``.

    Args:
        pretrained: a folder or a Hugging Face id; one of a text-only language model fits every class, as does one of
            ours that was trained without features.
        shape: values of the new model's configuration that its weights depend on, such as ``vision_dim``. What the
            pretrained configuration does not name is not compared.
        media: such values of the new model's media tokens, compared with a pretrained model that has media too; any
            other gets new ones. A value that the pretrained configuration does not name is the default.
        matching: such values of a matching part, compared if both models have one.

    Raises:
        InputError: it cannot be opened, is a model of a class that is no relative, or has another shape.
    """
    config = _config_of(pretrained)
    if not config or not isinstance(config, dict):
        raise InputError(
            f"{pretrained} has no configuration of a model (config.json); give the folder or id of a saved "
            "transformers model"
        )
    names = config.get("architectures") or []
    fitting = {name}.union(*(relatives for relatives in _RELATIVES if name in relatives))
    others = [other for other in names if other in MODULES and other not in fitting]
    if others:
        raise InputError(f"{pretrained} is a {others[0]}, the new model is a {name}; start from a {name}")
    if _is_text_alone(config):
        return
    differing = [(key, config[key], value) for key, value in (shape or {}).items() if config.get(key, value) != value]
    if config.get("inject", "encoder") != "encoder":
        defaults = model_class(name).config_class
        found = [(key, config.get(key, getattr(defaults, key)), value) for key, value in (media or {}).items()]
        differing += [each for each in found if each[1] != each[2]]
    if name in names and config.get("projection_width"):
        differing += [(key, config[key], value) for key, value in (matching or {}).items() if config[key] != value]
    for key, old, new in differing:
        raise InputError(
            f"{pretrained} was trained with {key} {old!r}, the new model has {new!r}; use the features and the fusion "
            "or resampler that it was trained with, and the same texts' limit, or a text-only backbone"
        )


def reads_text_alone(pretrained: str) -> bool:
    """Whether a model of ours was trained without features: its fusion, of one number, is to be made anew."""
    return _is_text_alone(_config_of(pretrained))


def _is_text_alone(config: Mapping[str, Any]) -> bool:
    return (config.get("vision_num_patches"), config.get("vision_dim")) == (1, 1)


def _config_of(pretrained: str) -> dict[str, Any]:
    from transformers import PreTrainedConfig

    with opening(pretrained, "the model"):
        return PreTrainedConfig.get_config_dict(pretrained, trust_remote_code=False)[0]


def _name_in(folder: str | Path) -> str:
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise InputError(
            f"{folder} holds no model (no config.json); give the folder of one, such as runs/demo/answer/model"
        )
    if (fault := fault_of(path, "the configuration of a model")) is not None:
        raise InputError(fault)
    config = json.loads(path.read_bytes())
    names = config.get("architectures") or [] if isinstance(config, dict) else []
    known = [name for name in names if isinstance(name, str) and name in MODULES] if isinstance(names, list) else []
    name = next(iter(known), None)
    if name is None:
        raise InputError(
            f"{path} names the architectures {names}, expected one of {sorted(MODULES)}; give the folder of a model "
            "that mmcot saved"
        )
    return name


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    from transformers.utils import logging

    was_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            logging.enable_progress_bar()
