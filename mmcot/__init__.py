"""The method: a T5 with vision features that generates a rationale and then the answer.

Multimodal-CoT (arXiv:2302.00923) in torch and transformers. This package does not depend
on clusters, shard files, configuration files or experiment tracking.

    from mmcot import open_model, T5ForMultimodalGeneration     # torch is imported when a name is first used
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PUBLIC = {
    "open_model": "mmcot.models.opening",
    "T5ForMultimodalGeneration": "mmcot.models.t5",
    "MultimodalT5Config": "mmcot.models.t5",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'mmcot' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
