"""LoRA (arXiv:2106.09685): a frozen layer W gets a trained one of low rank beside it, W x + (alpha / r) B A x.

    add_adapters(model, rank=8, alpha=16.0, dropout=0.0, targets=("q", "v"), seed=0)
    merged_state(model, state)                 # names and weights of the same model without adapters
    save_adapters(model, state, folder)        # a folder that peft.PeftModel.from_pretrained(base, folder) opens

The layers are those of the library peft, put into the model in place, so that its class and its contract stay. The
weight ``q.weight`` of an adapted layer is then ``q.base_layer.weight``, beside ``q.lora_A.default.weight`` [r, in] and
``q.lora_B.default.weight`` [out, r]. A starts at random and B at zero: the model computes what it computed before.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from mmcot.errors import InputError, MissingPackageError

WEIGHTS_FILE = "adapter_model.safetensors"  # peft's name
_ADAPTER = "default"  # peft's name of the only one
BASE_LAYER = ".base_layer."  # in the name of a weight beside which an adapter stands


def add_adapters(model: Any, *, rank: int, alpha: float, dropout: float, targets: Sequence[str], seed: int) -> None:
    """Put an adapter beside every target layer of the language model; equal on all ranks.

    Args:
        model: as ``mmcot/models/contract.py`` describes it; its own new parts get no adapters.
        rank: r, the inner width of an adapter.
        alpha: the adapters' output is scaled by ``alpha / rank``.
        dropout: of an adapter's input, in training.
        targets: see ``target_layers``.
        seed: of the matrices A.

    Raises:
        InputError: a target fits no layer.
        MissingPackageError: peft is not installed.
    """
    peft = _import_peft()
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=target_layers(model, targets)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, model, adapter_name=_ADAPTER)


def target_layers(model: Any, targets: Sequence[str]) -> list[str]:
    """The names of the linear layers that targets fit: the end of a name, such as ``q`` or ``SelfAttention.q``.

    Raises:
        InputError: a target fits none; the message names those that exist.
    """
    output = model.get_output_embeddings()  # it may be tied to the input
    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not output and not f"{name}.".startswith(model.new_parts)
    ]
    for target in targets:
        if not any(_fits(name, target) for name in layers):
            known = sorted({name.rpartition(".")[2] for name in layers})
            raise InputError(
                f"the LoRA target {target!r} is no linear layer of this language model; it has {', '.join(known)}"
            )
    return [name for name in layers if any(_fits(name, target) for target in targets)]


def has_adapters(model: Any) -> bool:
    """Whether ``add_adapters`` was called for the model."""
    return hasattr(model, "peft_config")


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is that of an adapter."""
    return ".lora_A." in name or ".lora_B." in name


def merged_state(model: Any, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of the model with its adapters added to them, by their names without adapters.

    Args:
        state: all weights in fp32; unchanged.
    """
    config = model.peft_config[_ADAPTER]
    scale, merged = config.lora_alpha / config.r, {}
    for name, value in state.items():
        if is_adapter(name):
            continue
        layer, found, part = name.rpartition(BASE_LAYER)
        if found and part == "weight":
            a_RI, b_OR = (state[f"{layer}.{side}.{_ADAPTER}.weight"] for side in ("lora_A", "lora_B"))
            value = value.cpu() + scale * (b_OR.cpu() @ a_RI.cpu())  # GPUs may round the factors (TF32)
        merged[f"{layer}.{part}" if found else name] = value
    return merged


def save_adapters(model: Any, state: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write the adapters alone, in peft's form: ``adapter_config.json`` and ``adapter_model.safetensors``.

    The configuration names the model they belong to where that is an id of the Hugging Face Hub. A folder is not
    named, because it may move.

    Args:
        state: all weights of the model with adapters.
    """
    config, base = copy.copy(model.peft_config[_ADAPTER]), model.config.name_or_path
    config.base_model_name_or_path = base if base and not Path(base).exists() else None
    config.inference_mode = True
    config.target_modules = sorted(config.target_modules)  # in a set their order would differ between processes
    config.save_pretrained(str(folder))
    tensors = {
        f"base_model.model.{name.replace(f'.{_ADAPTER}.', '.')}": value.contiguous()
        for name, value in state.items()
        if is_adapter(name)
    }
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def _fits(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _import_peft() -> Any:
    try:
        import peft  # pyright: ignore[reportMissingImports] (optional)
    except ImportError as error:
        raise MissingPackageError(
            "LoRA adapters need the package peft, which is not installed; run `pip install 'mmcot[lora]'` on every "
            "machine of the run"
        ) from error
    return peft
