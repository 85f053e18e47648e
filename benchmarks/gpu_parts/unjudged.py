"""What the parts replace on a device whose values mean nothing (``--not-judged``): what depends on values there.

Such a device counts launches, waits and memory of the real program; its numbers, and shapes that depend on numbers, are
arbitrary. A process with these replacements proves nothing about values.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def check_no_values() -> None:
    """Let every loss pass, also one that is not finite, and let the only rank hear its own messages."""
    from launcher.training import (
        checkpoint,
        checkpoint_files,
        checkpoint_resume,
        checkpoint_store,
        collectives,
        export,
        identity,
        loop,
        opening,
        step_checks,
        torchrun,
        zero_stage,
    )
    from mmcot.models.t5 import T5ForMultimodalGeneration

    torchrun.worker_variables = lambda cluster: {}  # memory in segments that grow takes the driver's own calls

    T5ForMultimodalGeneration.observe = lambda self, inputs: None  # the gate's opening at real tokens
    replaced = {
        "was_applied": lambda engine, loss: True,
        "check_finite": lambda *arguments: None,
        "check_probe": lambda *arguments, **options: None,
        "gather_json": lambda value: [value],
        "broadcast_json": lambda value, **options: value,
    }
    modules = (checkpoint, checkpoint_files, checkpoint_resume, checkpoint_store, collectives, export, identity, loop)
    for module in (*modules, opening, step_checks, zero_stage):
        for name, function in replaced.items():
            if hasattr(module, name):
                setattr(module, name, function)


def keep_any_graph() -> None:
    """Use a block's graph whatever loss it computes."""
    from launcher.training import block_graphs

    block_graphs._close = lambda found, expected, dtype: True


def encode_any_value() -> None:
    """Let an encoder return features that are not finite."""
    from mmcot.vision.encoders import VisionEncoder

    def encode(self: Any, images: Any) -> np.ndarray:
        return self._features(torch.stack([self.preprocess(image) for image in images])).half().cpu().numpy()

    VisionEncoder.encode = encode
