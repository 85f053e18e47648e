"""Reading checkpoints of the published system (amazon-science/mm-cot, arXiv:2302.00923).

    import_checkpoint("mm-cot-base-rationale", "imported", vision_num_patches=145)
    model = open_model("imported")

A published folder holds a T5 ``config.json``, the weights and usually a tokenizer. Its
state dict is T5's with eight tensors more:

    encoder.image_dense.{weight,bias}    encoder.gate_dense.{weight,bias}
    encoder.mha_layer.{in_proj_weight,in_proj_bias,out_proj.weight,out_proj.bias}

whose names lack ``encoder.`` in the first release. The imported folder has one copy of each
tensor, and the shape of the vision features in its ``config.json``. This module does not
depend on training or on where checkpoints are published.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil

import safetensors.torch
import torch
from transformers import PreTrainedConfig

from mmcot.errors import InputError
from mmcot.file_kinds import describe_unreadable, fault_of
from mmcot.models.opening import DEFAULT, model_class, open_model
from mmcot.torch_files import TorchFileError, describe_value, read_torch_file
from mmcot.vision.encoder_kinds import ENCODERS

_FUSION_PARTS = ("image_dense.", "mha_layer.", "gate_dense.")
_EMBEDDING = "shared.weight"
_OUTPUT_LAYER = "lm_head.weight"
_EMBEDDING_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
_COMPANION_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
    "generation_config.json",
)


class CheckpointError(InputError):
    """A checkpoint that cannot be read; the message names its file."""


@dataclasses.dataclass(frozen=True, slots=True)
class ImportedCheckpoint:
    """The imported folder, the model's shape, and the files copied to the folder."""

    path: pathlib.Path
    num_parameters: int
    vision_num_patches: int
    vision_dim: int
    tied: bool
    copied_files: tuple[str, ...]  # empty: the source has no tokenizer


def import_checkpoint(
    source_dir: str | pathlib.Path,
    output_dir: str | pathlib.Path,
    *,
    vision_num_patches: int | None = None,
    vision_dim: int | None = None,
) -> ImportedCheckpoint:
    """Convert a published checkpoint to a folder that ``open_model`` opens.

    Args:
        source_dir: folder with ``config.json`` and ``model.safetensors`` or
            ``pytorch_model.bin``. Pickles are read with ``weights_only=True``.
        output_dir: a new or empty folder.
        vision_num_patches: P of the features [P, D] it was trained on, needed where
            ``config.json`` has no ``patch_size`` (the weights do not contain it).
        vision_dim: D; by default it is read from the weights.

    Raises:
        CheckpointError: a file is absent or unreadable, a tensor missing, unexpected or of
            another shape, or the sizes contradict each other.
    """
    source, output = pathlib.Path(source_dir), pathlib.Path(output_dir)
    if output.exists() and any(output.iterdir()):
        raise CheckpointError(f"output folder {output} is not empty; give a new one")
    settings = _read_settings(source / "config.json")
    for name in _COMPANION_FILES:
        path = source / name
        if path.is_file() and (fault := fault_of(path, "a file of the model's tokenizer or settings")) is not None:
            raise CheckpointError(fault)
    weights_file = _find_weights(source)
    state = _with_encoder_prefix(_read_weights(weights_file), weights_file)
    shape = _vision_shape(settings, state, weights_file, vision_num_patches, vision_dim)
    config = _build_config(settings, *shape)
    state = _without_copies(state, config, weights_file)
    _check_tensors(state, config, weights_file)
    copied = _write(state, config, source, output)
    _verify(output, state)
    return ImportedCheckpoint(output, _count(state), *shape, tied=config.is_tied, copied_files=copied)


def _read_settings(path: pathlib.Path) -> dict:
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; a published checkpoint is a folder with config.json and weights")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise CheckpointError(describe_unreadable(path, "the configuration of a T5")) from None
    if not isinstance(settings, dict) or settings.get("model_type", "t5") != "t5" or "d_model" not in settings:
        raise CheckpointError(f"{path} does not describe a T5 (model_type 't5' with a d_model); give a T5 checkpoint")
    return settings


def _find_weights(source: pathlib.Path) -> pathlib.Path:
    for name in _WEIGHT_FILES:
        if (source / name).is_file():
            return source / name
    raise CheckpointError(f"{source} has none of {', '.join(_WEIGHT_FILES)}; put the weights there under such a name")


def _read_weights(path: pathlib.Path) -> dict[str, torch.Tensor]:
    expected = "a state dict (tensor names and tensors)"
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except safetensors.SafetensorError:
            raise CheckpointError(describe_unreadable(path, expected)) from None
    try:
        state = read_torch_file(path, expected)
    except TorchFileError as error:
        raise CheckpointError(str(error)) from None
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise CheckpointError(
            f"{path} holds {describe_value(state)}, expected {expected}; export the model's state_dict()"
        )
    return state


def _with_encoder_prefix(state: dict[str, torch.Tensor], path: pathlib.Path) -> dict[str, torch.Tensor]:
    """Rename the first release's fusion tensors to the names of later releases."""
    renamed = {}
    for name, tensor in state.items():
        new_name = f"encoder.{name}" if name.startswith(_FUSION_PARTS) else name
        if new_name in renamed:
            raise CheckpointError(f"{path} has {new_name} both with and without 'encoder.'; remove one of them")
        renamed[new_name] = tensor
    return renamed


def _vision_shape(
    settings: dict,
    state: dict[str, torch.Tensor],
    path: pathlib.Path,
    num_patches: int | None,
    dim: int | None,
) -> tuple[int, int]:
    """The features' [P, D]: the arguments, else the configuration's, else D from the weights."""
    dense = state.get("encoder.image_dense.weight")
    if dense is None or dense.dim() != 2:
        raise CheckpointError(f"{path} has no encoder.image_dense.weight [d_model, D]; it is a T5 without vision")
    width = dense.shape[1]
    patch_size = settings.get("patch_size") or (settings.get("vision_num_patches"), settings.get("vision_dim"))
    num_patches = num_patches or patch_size[0]
    dim = dim or patch_size[1] or width
    if dim != width:
        raise CheckpointError(
            f"vision_dim is {dim}, but encoder.image_dense.weight in {path} reads features of width {width}; "
            "use the features this checkpoint was trained on"
        )
    if not num_patches:
        published = {name: kind.published_shape for name, kind in ENCODERS.items() if kind.published_shape}
        known = [f"{shape[0]} ({name})" for name, shape in published.items() if shape[1] == width]
        hint = " or ".join(known) or "unknown for this width"
        raise CheckpointError(
            f"the number of patches is neither in config.json nor given, and the weights in {path} do not contain it; "
            f"pass vision_num_patches (published features of width {width}: {hint})"
        )
    return int(num_patches), int(dim)


def _build_config(settings: dict, num_patches: int, dim: int) -> PreTrainedConfig:
    # patch_size would collide with the from_pretrained argument of that name; the dtype is that of the weights.
    dropped = ("patch_size", "architectures", "torch_dtype", "dtype", "_name_or_path")
    kept = {name: value for name, value in settings.items() if name not in dropped}
    kept |= {"vision_num_patches": num_patches, "vision_dim": dim}
    config = model_class(DEFAULT).config_class.from_dict(kept)
    config.architectures = [DEFAULT]
    return config


def _without_copies(
    state: dict[str, torch.Tensor], config: PreTrainedConfig, path: pathlib.Path
) -> dict[str, torch.Tensor]:
    """Check that the copies of the shared embedding are equal to it, and drop them."""
    copies = (*_EMBEDDING_COPIES, _OUTPUT_LAYER) if config.is_tied else _EMBEDDING_COPIES
    present = [name for name in copies if name in state]
    if present and _EMBEDDING not in state:
        state = state | {_EMBEDDING: state[present[0]]}
    for name in present:
        if not torch.equal(state[name], state[_EMBEDDING]):
            remedy = "; set tie_word_embeddings to false in config.json if it is a Flan T5" * (name == _OUTPUT_LAYER)
            raise CheckpointError(f"{name} in {path} differs from {_EMBEDDING}; expected a copy of it{remedy}")
    return {name: tensor for name, tensor in state.items() if name not in copies}


def _check_tensors(state: dict[str, torch.Tensor], config: PreTrainedConfig, path: pathlib.Path) -> None:
    with torch.device("meta"):
        expected = dict(model_class(DEFAULT)(config).named_parameters())  # tied ones appear once
    missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or unexpected:
        raise CheckpointError(
            f"{path} does not fit its config.json: missing {', '.join(missing) or 'nothing'}; "
            f"unexpected {', '.join(unexpected) or 'nothing'}; use the config.json it was saved with"
        )
    wrong = [
        f"{name} is {list(state[name].shape)}, expected {list(parameter.shape)}"
        for name, parameter in expected.items()
        if state[name].shape != parameter.shape
    ]
    if wrong:
        others = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise CheckpointError(
            f"{path} is of another size than its config.json: {'; '.join(wrong[:3])}{others}; "
            "use the config.json of this backbone"
        )


def _write(
    state: dict[str, torch.Tensor], config: PreTrainedConfig, source: pathlib.Path, output: pathlib.Path
) -> tuple[str, ...]:
    """Write weights and companion files, then ``config.json``: without it the folder cannot be opened."""
    output.mkdir(parents=True, exist_ok=True)
    plain = {name: tensor.contiguous() for name, tensor in state.items()}
    if _OUTPUT_LAYER in plain:  # it may share memory with the embedding, which safetensors does not allow
        plain[_OUTPUT_LAYER] = plain[_OUTPUT_LAYER].clone()
    safetensors.torch.save_file(plain, output / "model.safetensors", metadata={"format": "pt"})
    copied = tuple(name for name in _COMPANION_FILES if (source / name).is_file())
    for name in copied:
        shutil.copyfile(source / name, output / name)
    config.save_pretrained(output)
    return copied


def _verify(output: pathlib.Path, state: dict[str, torch.Tensor]) -> None:
    """Open the folder as a user will and compare every tensor: tying must not have changed any."""
    model, info = open_model(output, output_loading_info=True)
    problems = {kind: sorted(info[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    assert not any(problems.values()), problems
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, state[name]), name


def _count(state: dict[str, torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in state.values())
