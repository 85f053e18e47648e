"""Which parameters of a model are trained; the others are frozen: no gradient and no state of the optimizer.

choose_trained(model, "bridge")                              # the parts that are new to the language model
choose_trained(model, ["encoder.bridge", "decoder.block.1"])
count_parameters(model).trained
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Sequence
from typing import Any

from mmcot.errors import InputError
from mmcot.models.lora import is_adapter

WORDS = ("all", "bridge", "lora")  # for what need not be named


@dataclasses.dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters: all, those that are trained, and of these the adapters."""

    total: int
    trained: int
    adapters: int = 0

    @property
    def frozen(self) -> int:
        """Parameters that are not trained."""
        return self.total - self.trained


def choose_trained(model: Any, trains: str | Sequence[str]) -> None:
    """Let these parameters be trained and freeze all others, by their ``requires_grad``.

    Args:
        model: as ``mmcot/models/contract.py`` describes it.
        trains: "all"; "bridge", which is ``model.new_parts``; "lora", the bridge and the adapters; or beginnings of
            parameter names up to a dot, such as ``decoder.block.1``.

    Raises:
        InputError: a name fits no parameter; the message has the nearest ones.
    """
    names = [name for name, _ in model.named_parameters()]
    for prefix in () if isinstance(trains, str) else trains:
        if not any(_is_below(name, prefix) for name in names):
            raise InputError(f"{prefix!r} fits no parameter of this model; did you mean {_nearest(prefix, names)}?")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_is_trained(name, trains, model.new_parts))


def count_parameters(model: Any) -> ParameterCounts:
    """Count the parameters of a model, also of one that ZeRO-3 has partitioned."""
    sizes = [
        (name, math.prod(getattr(parameter, "ds_shape", parameter.shape)), parameter.requires_grad)
        for name, parameter in model.named_parameters()
    ]
    return ParameterCounts(
        total=sum(size for _, size, _ in sizes),
        trained=sum(size for _, size, learns in sizes if learns),
        adapters=sum(size for name, size, learns in sizes if learns and is_adapter(name)),
    )


def _is_trained(name: str, trains: str | Sequence[str], new_parts: tuple[str, ...]) -> bool:
    if not isinstance(trains, str):
        return any(_is_below(name, prefix) for prefix in trains)
    return trains == "all" or name.startswith(new_parts) or (trains == "lora" and is_adapter(name))


def _is_below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def _nearest(prefix: str, names: Sequence[str]) -> str:
    parts = [name.split(".") for name in names]
    known = sorted({".".join(part[:length]) for part in parts for length in range(1, len(part) + 1)} | set(WORDS))
    near = difflib.get_close_matches(prefix, known, n=3, cutoff=0.5) or sorted({part[0] for part in parts})
    return ", ".join(near)
