"""Importing published checkpoints: each becomes a folder that ``open_model`` opens.

    import_checkpoint("mm-cot-base-rationale", "imported", vision_num_patches=145)
    import_checkpoint("blip2-flan-t5-xl", "imported")
    import_checkpoint("idefics-9b", "imported", language_model="google/flan-t5-base")

| source | what is read |
|---|---|
| Multimodal-CoT (amazon-science/mm-cot, arXiv:2302.00923) | the whole model, here |
| BLIP-2 with a T5 (arXiv:2301.12597) | Q-Former, projection and T5, in ``blip2_import.py`` |
| IDEFICS, OpenFlamingo | the resampler, beside a T5 that is given, in ``perceiver_import.py`` |

A folder of Multimodal-CoT holds a T5 ``config.json``, the weights and usually a tokenizer. Its state dict is T5's with
eight tensors more:

    encoder.image_dense.{weight,bias}    encoder.gate_dense.{weight,bias}
    encoder.mha_layer.{in_proj_weight,in_proj_bias,out_proj.weight,out_proj.bias}

whose names lack ``encoder.`` in the first release. The imported folder has one copy of each tensor, and the shape of
the vision features in its ``config.json``. This module does not depend on training or on where checkpoints are
published.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

from mmcot.models.blip2_import import read_blip2
from mmcot.models.checkpoint_files import (
    COMPANION_FILES,
    CheckpointError,
    Weights,
    check_output,
    check_tensors,
    config_of,
    read_settings,
    read_weights,
    shapes_of,
    without_copies,
    write_model,
)
from mmcot.models.opening import DEFAULT, model_class
from mmcot.models.perceiver_import import (
    PublishedResampler,
    is_openflamingo,
    read_idefics,
    read_openflamingo,
    write_beside,
)
from mmcot.vision.encoder_kinds import ENCODERS

__all__ = ["CheckpointError", "ImportedCheckpoint", "import_checkpoint"]

_FUSION_PARTS = ("image_dense.", "mha_layer.", "gate_dense.")
_PERCEIVERS: dict[str, Callable[..., Any]] = {"idefics": read_idefics, "openflamingo": read_openflamingo}


@dataclasses.dataclass(frozen=True, slots=True)
class ImportedCheckpoint:
    """The imported folder, the model's shape, and the files copied to the folder.

    ``media`` are the values of its configuration that a training from it must repeat (``MultimodalT5Config``); empty
    for Multimodal-CoT. ``features`` is the name of the features it was trained on, where they can be made here.
    """

    path: pathlib.Path
    num_parameters: int
    vision_num_patches: int
    vision_dim: int
    tied: bool
    copied_files: tuple[str, ...]  # empty: the source has no tokenizer
    media: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    features: str | None = None


def import_checkpoint(
    source_dir: str | pathlib.Path,
    output_dir: str | pathlib.Path,
    *,
    vision_num_patches: int | None = None,
    vision_dim: int | None = None,
    language_model: str | None = None,
) -> ImportedCheckpoint:
    """Convert a published checkpoint to a folder that ``open_model`` opens.

    Args:
        source_dir: folder with ``config.json`` and ``model.safetensors`` or ``pytorch_model.bin``, or such files in
            parts; OpenFlamingo's ``checkpoint.pt`` or its folder. Pickles are read with ``weights_only=True``.
        output_dir: a new or empty folder.
        vision_num_patches: P of the features [P, D] it was trained on, needed for Multimodal-CoT where ``config.json``
            has no ``patch_size`` (the weights do not contain it).
        vision_dim: D; by default it is read from the weights.
        language_model: folder or id of a T5, needed for IDEFICS and OpenFlamingo, whose own is a causal one.

    Raises:
        CheckpointError: it is of another class, a file is absent or unreadable, a tensor missing, unexpected or of
            another shape, or the sizes contradict each other.
    """
    source, output = pathlib.Path(source_dir), pathlib.Path(output_dir)
    check_output(output)
    settings = {"model_type": "openflamingo"} if is_openflamingo(source) else read_settings(source)
    kind = str(settings.get("model_type", "t5"))
    _check_given(source, kind, vision_num_patches, vision_dim, language_model)
    if kind == "t5" and "d_model" in settings:
        return _import_published(settings, source, output, vision_num_patches, vision_dim)
    if kind not in ("blip-2", *_PERCEIVERS):
        raise CheckpointError(
            f"{source / 'config.json'} does not describe a T5 (model_type 't5' with a d_model), a BLIP-2 ('blip-2') or "
            f"an IDEFICS ('idefics') but the kind {kind!r}; give such a checkpoint"
        )
    if language_model is not None:
        size = {} if vision_num_patches is None else {"num_patches": vision_num_patches}
        return _import_resampler(_PERCEIVERS[kind](source, **size), language_model, output)
    return _import_blip2(settings, source, output)


def _check_given(
    source: pathlib.Path, kind: str, num_patches: int | None, dim: int | None, language_model: str | None
) -> None:
    """Raise CheckpointError where an argument is missing or does not go with the kind of checkpoint."""
    if kind in _PERCEIVERS and language_model is None:
        raise CheckpointError(
            f"of {source}, of the kind {kind!r}, the resampler alone is read, because its language model is a causal "
            "one; give a T5 to put it beside, a folder or id, as language_model"
        )
    if kind not in _PERCEIVERS and language_model is not None:
        raise CheckpointError(f"{source} is of the kind {kind!r} and has its own language model; give no other one")
    if (dim is not None and kind != "t5") or (num_patches is not None and kind not in ("t5", "openflamingo")):
        raise CheckpointError(f"{source} is of the kind {kind!r}, which says the shape of its features; do not give it")


def _import_resampler(resampler: PublishedResampler, language_model: str, output: pathlib.Path) -> ImportedCheckpoint:
    config, num_parameters = write_beside(language_model, resampler, output)
    copied = tuple(sorted(path.name for path in output.iterdir() if path.name in COMPANION_FILES))
    return _imported(output, config, num_parameters, copied_files=copied)


def _import_blip2(settings: dict[str, Any], source: pathlib.Path, output: pathlib.Path) -> ImportedCheckpoint:
    config, state = read_blip2(settings, source)
    copied = write_model(state, config, source, output)
    return _imported(output, config, _count(state), copied_files=copied, features="blip2")


def _imported(output: pathlib.Path, config: Any, num_parameters: int, **others: Any) -> ImportedCheckpoint:
    return ImportedCheckpoint(
        output,
        num_parameters,
        config.vision_num_patches,
        config.vision_dim,
        tied=config.is_tied,
        media=config.media_values,
        **others,
    )


def _import_published(
    settings: dict[str, Any], source: pathlib.Path, output: pathlib.Path, num_patches: int | None, dim: int | None
) -> ImportedCheckpoint:
    """Import a checkpoint of Multimodal-CoT."""
    weights = _with_encoder_prefix(read_weights(source))
    shape = _vision_shape(settings, weights, num_patches, dim)
    config: Any = config_of(settings, {"vision_num_patches": shape[0], "vision_dim": shape[1]})
    weights = without_copies(weights, is_tied=config.is_tied)
    with torch.device("meta"):
        check_tensors(weights, shapes_of(model_class(DEFAULT)(config)))
    copied = write_model(weights.state, config, source, output)
    return ImportedCheckpoint(output, _count(weights.state), *shape, tied=config.is_tied, copied_files=copied)


def _with_encoder_prefix(weights: Weights) -> Weights:
    """Rename the first release's fusion tensors to the names of later releases."""
    renamed = {}
    for name, tensor in weights.state.items():
        new_name = f"encoder.{name}" if name.startswith(_FUSION_PARTS) else name
        if new_name in renamed:
            raise CheckpointError(f"{weights.path} has {new_name} both with and without 'encoder.'; remove one of them")
        renamed[new_name] = tensor
    return Weights(renamed, weights.path)


def _vision_shape(
    settings: dict[str, Any], weights: Weights, num_patches: int | None, dim: int | None
) -> tuple[int, int]:
    """The features' [P, D]: the arguments, else the configuration's, else D from the weights."""
    dense, path = weights.state.get("encoder.image_dense.weight"), weights.path
    if dense is None or dense.dim() != 2:
        raise CheckpointError(f"{path} has no encoder.image_dense.weight [d_model, D]; it is a T5 without vision")
    width = dense.shape[1]
    patch_size: Any = settings.get("patch_size") or (settings.get("vision_num_patches"), settings.get("vision_dim"))
    dim = dim or patch_size[1] or width
    if dim != width:
        raise CheckpointError(
            f"vision_dim is {dim}, but encoder.image_dense.weight in {path} reads features of width {width}; "
            "use the features this checkpoint was trained on"
        )
    num_patches = num_patches or patch_size[0]
    if not num_patches:
        published = {name: kind.published_shape for name, kind in ENCODERS.items() if kind.published_shape}
        known = [f"{shape[0]} ({name})" for name, shape in published.items() if shape[1] == width]
        hint = " or ".join(known) or "unknown for this width"
        raise CheckpointError(
            f"the number of patches is neither in config.json nor given, and the weights in {path} do not contain it; "
            f"pass vision_num_patches (published features of width {width}: {hint})"
        )
    return int(num_patches), width


def _count(state: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in state.values())
