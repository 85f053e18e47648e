"""The weights that a training does not change, as they were before they were rounded to its precision.

    exact = exact_weights("google/flan-t5-base", {"shared.weight": rounded})     # {"shared.weight": float32 tensor}

A training in bf16 has fp32 copies of what it trains alone. What is frozen is read again from the model it started from.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from safetensors import safe_open

from mmcot.models.lora import BASE_LAYER
from mmcot.pretrained import folder_of


def exact_weights(pretrained: str, rounded: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the fp32 values of some weights of a saved model.

    A weight is left out if the model has no safetensors with its name, or if its value there is not the rounded one.

    Args:
        pretrained: a folder, or a Hugging Face id whose files are on this machine; "" for none.
        rounded: the weights as the training has them, by their names in the model.
    """
    folder = folder_of(pretrained) if pretrained else None
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")) if folder else ():
        with safe_open(path, "pt") as file:
            stored = set(file.keys())
            for name, value in rounded.items():
                of_start = name.replace(BASE_LAYER, ".")
                if of_start in stored and name not in found:
                    exact = file.get_tensor(of_start).float()
                    if exact.shape == value.shape and torch.equal(exact.to(value.dtype), value.cpu()):
                        found[name] = exact
    return found
