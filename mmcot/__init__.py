"""The method: a T5 with vision features that generates a rationale and then the answer.

Multimodal-CoT (arXiv:2302.00923) in torch and transformers. This package does not depend
on clusters, shard files, configuration files or experiment tracking.

    from mmcot import open_model, T5ForMultimodalGeneration     # torch is imported when a name is first used
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmcot.models.opening import open_model
    from mmcot.models.t5 import MultimodalT5Config, T5ForMultimodalGeneration

__all__ = ["MultimodalT5Config", "T5ForMultimodalGeneration", "open_model"]

_MODULES = {
    "open_model": "mmcot.models.opening",
    "T5ForMultimodalGeneration": "mmcot.models.t5",
    "MultimodalT5Config": "mmcot.models.t5",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'mmcot' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
