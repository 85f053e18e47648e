"""Reading and writing the files of a checkpoint that is imported: configuration, weights and tokenizer.

    settings = read_settings(source)                    # of config.json
    weights = read_weights(source)                      # one file, or several with an index
    check_tensors(weights, expected_shapes)
    write_model(weights.state, config, source, output)

Pickles are read as tensors alone, never run. What a checkpoint means is no concern of this module.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import safetensors
import safetensors.torch
import torch
from transformers import PreTrainedConfig

from mmcot.errors import InputError
from mmcot.file_kinds import describe_unreadable, fault_of
from mmcot.models.opening import DEFAULT, model_class, open_model
from mmcot.torch_files import TorchFileError, describe_value, read_torch_file

EMBEDDING, OUTPUT_LAYER = "shared.weight", "lm_head.weight"
_EMBEDDING_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
_INDEX = ".index.json"  # names the file of each tensor where the weights are in several
_EXPECTED = "a state dict (tensor names and tensors)"
COMPANION_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
    "generation_config.json",
)
_NOT_KEPT = ("patch_size", "architectures", "torch_dtype", "dtype", "_name_or_path")


class CheckpointError(InputError):
    """A checkpoint that cannot be read; the message names its file."""


@dataclasses.dataclass(frozen=True, slots=True)
class Weights:
    """A state dict, and the file it is from, for messages."""

    state: dict[str, torch.Tensor]
    path: pathlib.Path


def check_output(output: pathlib.Path) -> None:
    """Raise CheckpointError if the folder has files."""
    if output.exists() and any(output.iterdir()):
        raise CheckpointError(f"output folder {output} is not empty; give a new one")


def read_settings(source: pathlib.Path) -> dict[str, Any]:
    """The content of ``config.json``.

    Raises:
        CheckpointError: it is absent or no JSON object, or a file beside it that is copied is no such file.
    """
    path = source / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; a published checkpoint is a folder with config.json and weights")
    settings = _read_json(path, "the configuration of a model")
    for name in COMPANION_FILES:
        companion = source / name
        if companion.is_file() and (fault := fault_of(companion, "a file of the model's tokenizer or settings")):
            raise CheckpointError(fault)
    return settings


def read_weights(source: pathlib.Path, only: Callable[[str], bool] = lambda name: True) -> Weights:
    """The tensors of a folder, of one file or of several that an index names.

    Args:
        only: which names are wanted; files without any are not opened.

    Raises:
        CheckpointError: a file is absent, unreadable or not the one that the index names.
    """
    for name in _WEIGHT_FILES:
        if (source / name).is_file():
            return Weights(_read_file(source / name, only), source / name)
        if (source / f"{name}{_INDEX}").is_file():
            return _read_several(source / f"{name}{_INDEX}", only)
    raise CheckpointError(f"{source} has none of {', '.join(_WEIGHT_FILES)}; put the weights there under such a name")


def without_copies(weights: Weights, *, is_tied: bool, prefix: str = "") -> Weights:
    """Check that the copies of a T5's shared embedding are equal to it, and drop them.

    Args:
        is_tied: whether the output layer is such a copy.
        prefix: before the names of the T5.
    """
    copies = [prefix + name for name in (*_EMBEDDING_COPIES, *([OUTPUT_LAYER] if is_tied else []))]
    state, shared = weights.state, prefix + EMBEDDING
    present = [name for name in copies if name in state]
    if present and shared not in state:
        state = state | {shared: state[present[0]]}
    for name in present:
        if not torch.equal(state[name], state[shared]):
            is_output = name == prefix + OUTPUT_LAYER
            remedy = "; set tie_word_embeddings to false in config.json if it is a Flan T5" * is_output
            raise CheckpointError(f"{name} in {weights.path} differs from {shared}; expected a copy of it{remedy}")
    return Weights({name: tensor for name, tensor in state.items() if name not in copies}, weights.path)


def check_tensors(weights: Weights, expected: Mapping[str, torch.Size], *, remedy: str | None = None) -> None:
    """Raise CheckpointError unless the tensors are exactly those of these names and shapes."""
    state, path, what = weights.state, weights.path, "config.json" if remedy is None else "own sizes"
    missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or unexpected:
        raise CheckpointError(
            f"{path} does not fit its {what}: missing {', '.join(missing) or 'nothing'}; "
            f"unexpected {', '.join(unexpected) or 'nothing'}; {remedy or 'use the config.json it was saved with'}"
        )
    wrong = [
        f"{name} is {list(state[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if state[name].shape != shape
    ]
    if wrong:
        others = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise CheckpointError(
            f"{path} is of another size than its {what}: {'; '.join(wrong[:3])}{others}; "
            f"{remedy or 'use the config.json of this backbone'}"
        )


def config_of(settings: Mapping[str, Any], added: Mapping[str, Any]) -> PreTrainedConfig:
    """The configuration of our model: a T5's own values and what ours adds.

    ``patch_size`` would collide with the ``from_pretrained`` argument of that name; the dtype is that of the weights.
    """
    kept = {name: value for name, value in settings.items() if name not in _NOT_KEPT}
    config = model_class(DEFAULT).config_class.from_dict(kept | dict(added))
    config.architectures = [DEFAULT]
    return config


def shapes_of(model: torch.nn.Module) -> dict[str, torch.Size]:
    """The shapes of the parameters by their names; tied ones appear once."""
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def write_model(
    state: Mapping[str, torch.Tensor], config: PreTrainedConfig, source: pathlib.Path, output: pathlib.Path
) -> tuple[str, ...]:
    """Write weights and companion files, then ``config.json``: without it the folder cannot be opened.

    The folder is then opened as a user will, and every tensor compared: tying must not have changed any.

    Returns:
        the names of the companion files that were copied.
    """
    output.mkdir(parents=True, exist_ok=True)
    plain = {name: tensor.contiguous() for name, tensor in state.items()}
    if OUTPUT_LAYER in plain:  # it may share memory with the embedding, which safetensors does not allow
        plain[OUTPUT_LAYER] = plain[OUTPUT_LAYER].clone()
    safetensors.torch.save_file(plain, output / "model.safetensors", metadata={"format": "pt"})
    copied = tuple(name for name in COMPANION_FILES if (source / name).is_file())
    for name in copied:
        shutil.copyfile(source / name, output / name)
    config.save_pretrained(output)
    _verify(output, plain)
    return copied


def _verify(output: pathlib.Path, state: Mapping[str, torch.Tensor]) -> None:
    model, info = open_model(output, output_loading_info=True, dtype=torch.float32)
    problems = {kind: sorted(info[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    assert not any(problems.values()), problems
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, state[name].float()), name


def _read_several(index: pathlib.Path, only: Callable[[str], bool]) -> Weights:
    files = _read_json(index, "the index of a model's files").get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise CheckpointError(f'{index} has no "weight_map" from tensor names to files; download it again')
    state: dict[str, torch.Tensor] = {}
    for file in sorted({file for name, file in files.items() if only(name)}):
        path = index.parent / file
        if pathlib.PurePath(file).name != file or not path.is_file():
            raise CheckpointError(f"{index} names the file {file!r}, which is not beside it; download it again")
        found = _read_file(path, only)
        listed = {name for name, its_file in files.items() if its_file == file and only(name)}
        if listed != found.keys():
            raise CheckpointError(
                f"{path} has other tensors than {index.name} says, such as {min(listed ^ found.keys())}; "
                "download both again"
            )
        state |= found
    return Weights(state, index)


def _read_file(path: pathlib.Path, only: Callable[[str], bool]) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys() if only(name)}  # noqa: SIM118
        except safetensors.SafetensorError:
            raise CheckpointError(describe_unreadable(path, _EXPECTED)) from None
    return {name: tensor for name, tensor in read_state(path).items() if only(name)}


def read_state(path: pathlib.Path) -> dict[str, torch.Tensor]:
    """The state dict in a file of torch, also where it is the entry ``model_state_dict`` of a training's checkpoint.

    Raises:
        CheckpointError: the file cannot be read or holds something else.
    """
    try:
        state = read_torch_file(path, _EXPECTED)
    except TorchFileError as error:
        raise CheckpointError(str(error)) from None
    if isinstance(state, dict) and isinstance(state.get("model_state_dict"), dict):
        state = state["model_state_dict"]
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise CheckpointError(
            f"{path} holds {describe_value(state)}, expected {_EXPECTED}; export the model's state_dict()"
        )
    return state


def _read_json(path: pathlib.Path, expected: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise CheckpointError(describe_unreadable(path, expected)) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {describe_value(value)}, expected {expected}; download it again")
    return value
