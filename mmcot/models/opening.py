"""Opening a saved model: its folder's ``config.json`` names the class.

model = open_model("runs/demo/answer/model")
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# A class by its name in ``architectures``, and its module.
MODULES = {"T5ForMultimodalGeneration": "mmcot.models.t5"}


def open_model(folder: str | Path, **options: Any) -> PreTrainedModel:
    """Open a model that was exported by a training or written by ``import-checkpoint``.

    Args:
        options: as for ``from_pretrained``, such as ``dtype``.

    Raises:
        ValueError: the folder contains no model of a known class.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} holds no model (no config.json); give the folder of one, such as runs/demo/answer/model"
        )
    names = json.loads(path.read_text(encoding="utf-8")).get("architectures") or []
    name = next((name for name in names if name in MODULES), None)
    if name is None:
        raise ValueError(
            f"{path} names the architectures {names}, expected one of {sorted(MODULES)}; give the folder of a model "
            "that mmcot saved"
        )
    return getattr(import_module(MODULES[name]), name).from_pretrained(folder, **options)
