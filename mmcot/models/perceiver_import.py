"""Reading the resamplers of IDEFICS and OpenFlamingo, and putting one beside a T5.

    resampler = read_idefics("idefics-9b")
    write_beside("google/flan-t5-base", resampler, "imported")

Both follow Flamingo (arXiv:2204.14198): a Perceiver resampler, and gated cross-attention in the layers of a causal
language model. The second fits those layers alone and is not read. The media keep the resampler's width and pass a new
linear layer to the T5's, so the result is a start for a training of the bridge, not a model that answers.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import torch

from mmcot.errors import InputError
from mmcot.models.checkpoint_files import (
    CheckpointError,
    Weights,
    check_tensors,
    read_state,
    read_weights,
    shapes_of,
)
from mmcot.models.opening import DEFAULT, check_start, model_class, open_model
from mmcot.pretrained import opening
from mmcot.texts.tokenizer import open_tokenizer

_OPENFLAMINGO = "checkpoint.pt"
_HEAD_WIDTH = 64  # of OpenFlamingo, whose weights do not say it
_OPENFLAMINGO_PATCHES = 256  # of its CLIP ViT-L/14 at 224 pixels
_IDEFICS = ("model.perceiver_resampler.", "perceiver_resampler.")  # below a head, and without one
_SEED = 0  # of the new linear layer

# The parts of a layer by their names there and here.
_IDEFICS_PARTS = {
    "0.context_layer_norm": "picture_norm",
    "0.latents_layer_norm": "latents_norm",
    "0.q_layer_norm": "attention.q_norm",
    "0.k_layer_norm": "attention.k_norm",
    "0.q_proj": "attention.q_proj",
    "0.k_proj": "attention.k_proj",
    "0.v_proj": "attention.v_proj",
    "0.output_proj": "attention.out_proj",
    "1.ln": "feed_forward_norm",
    "1.fc": "feed_forward.fc1",
    "1.c_proj": "feed_forward.fc2",
}
_OPENFLAMINGO_PARTS = {
    "0.norm_media": "picture_norm",
    "0.norm_latents": "latents_norm",
    "0.to_q": "attention.q_proj",
    "0.to_kv": "attention.kv",  # one matrix there, two here
    "0.to_out": "attention.out_proj",
    "1.0": "feed_forward_norm",
    "1.1": "feed_forward.fc1",
    "1.3": "feed_forward.fc2",
}


@dataclasses.dataclass(frozen=True, slots=True)
class PublishedResampler:
    """The state dict of a ``Perceiver`` of ours, and the values of our configuration that describe it."""

    state: dict[str, torch.Tensor]
    values: Mapping[str, Any]


def is_openflamingo(source: pathlib.Path) -> bool:
    """Whether it is a file of torch, or a folder that holds OpenFlamingo's and no ``config.json``."""
    is_folder = (source / _OPENFLAMINGO).is_file() and not (source / "config.json").exists()
    return is_folder or (source.is_file() and source.suffix == ".pt")


def read_idefics(source: pathlib.Path) -> PublishedResampler:
    """Read the resampler of an IDEFICS of version 1 (its class in transformers: ``IdeficsForVisionText2Text``).

    Raises:
        CheckpointError: it has no resampler, or a tensor is missing, unexpected or of another shape.
    """
    from transformers import IdeficsConfig
    from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

    with opening(source, "the configuration of IDEFICS"):
        config: Any = IdeficsConfig.from_pretrained(source, trust_remote_code=False)
    if not config.use_resampler:
        raise CheckpointError(
            f"{source / 'config.json'} has use_resampler false: this IDEFICS has no resampler to read"
        )
    vision, own = config.vision_config, config.perceiver_config
    sizes = (vision.embed_dim, own.resampler_depth, own.resampler_n_heads, own.resampler_head_dim)
    with torch.device("meta"):
        theirs = IdeficsPerceiverResampler(config, *sizes, own.resampler_n_latents)
    weights = read_weights(source, only=lambda name: name.startswith(_IDEFICS))
    prefix = next((each for each in _IDEFICS if any(name.startswith(each) for name in weights.state)), _IDEFICS[0])
    check_tensors(weights, {prefix + name: shape for name, shape in shapes_of(theirs).items()})
    state = {
        _our_name(name.removeprefix(prefix), _IDEFICS_PARTS): tensor.float() for name, tensor in weights.state.items()
    }
    return PublishedResampler(
        state,
        _values(
            width=vision.embed_dim,
            depth=own.resampler_depth,
            num_heads=own.resampler_n_heads,
            head_width=own.resampler_head_dim,
            num_tokens=own.resampler_n_latents,
            num_patches=(vision.image_size // vision.patch_size) ** 2 + 1,  # with the class token
        )
        | {"resample_activation": "relu", "resample_qk_norm": own.qk_layer_norms_perceiver},
    )


def read_openflamingo(source: pathlib.Path, *, num_patches: int = _OPENFLAMINGO_PATCHES) -> PublishedResampler:
    """Read ``perceiver.*`` of OpenFlamingo's published ``checkpoint.pt``; heads are 64 wide, as in its code.

    Args:
        source: the file or its folder.
        num_patches: P of the features; it changes nothing in the weights.

    Raises:
        CheckpointError: there is no resampler, or a tensor is missing, unexpected or of another shape.
    """
    path = source / _OPENFLAMINGO if source.is_dir() else source
    state = {name.removeprefix("module."): tensor for name, tensor in read_state(path).items()}
    prefix = "perceiver."
    found = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    if not found.keys() >= {"latents", "layers.0.0.to_q.weight"}:
        raise CheckpointError(
            f"{path} lacks perceiver.latents or perceiver.layers.0.0.to_q.weight, from which the sizes are read; give "
            "the checkpoint.pt of an OpenFlamingo"
        )
    (num_tokens, width), inner = found["latents"].shape, found["layers.0.0.to_q.weight"].shape[0]
    depth = 1 + max(int(match[1]) for name in found if (match := re.match(r"layers\.(\d+)\.", name)))
    remedy = "give OpenFlamingo's own file"
    check_tensors(Weights(found, path), _openflamingo_shapes(width, inner, depth, num_tokens), remedy=remedy)
    renamed = {_our_name(name, _OPENFLAMINGO_PARTS): tensor.float() for name, tensor in found.items()}
    for number in range(depth):
        attention = f"blocks.{number}.attention"
        keys, values = renamed.pop(f"{attention}.kv.weight").chunk(2)
        renamed |= {f"{attention}.k_proj.weight": keys, f"{attention}.v_proj.weight": values}
    sizes = _values(
        width=width,
        depth=depth,
        num_heads=inner // _HEAD_WIDTH,
        head_width=_HEAD_WIDTH,
        num_tokens=num_tokens,
        num_patches=num_patches,
    )
    return PublishedResampler(renamed, sizes)


def write_beside(language_model: str, resampler: PublishedResampler, output: pathlib.Path) -> tuple[Any, int]:
    """Write a model of a T5's weights, a resampler's and a new linear layer, with the T5's tokenizer.

    Returns:
        its configuration, and the number of parameters.

    Raises:
        InputError: the language model cannot be opened, is no whole T5, or has media already.
    """
    check_start(DEFAULT, language_model, media=resampler.values)
    tokenizer = open_tokenizer(language_model)
    with torch.random.fork_rng(devices=[]), opening(language_model, "the language model"):
        torch.manual_seed(_SEED)
        model, report = model_class(DEFAULT).from_pretrained(
            language_model,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
            **resampler.values,
        )
    missing = sorted(report["missing_keys"])
    if lacking := [name for name in missing if not name.startswith(model.new_parts)]:
        raise InputError(f"{language_model} is no whole T5: it lacks {lacking[0]}; give the folder or id of a T5")
    if not missing:
        raise InputError(f"{language_model} has media already, which these would replace; give a T5 without them")
    model.encoder.fusion.resampler.load_state_dict(resampler.state)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    opened = dict(open_model(output, dtype=torch.float32).named_parameters())
    for name, tensor in resampler.state.items():
        assert torch.equal(opened[f"encoder.bridge.resampler.{name}"], tensor), name
    return model.config, sum(parameter.numel() for parameter in model.parameters())


def _values(
    *, width: int, depth: int, num_heads: int, head_width: int, num_tokens: int, num_patches: int
) -> dict[str, Any]:
    return {
        "vision_num_patches": num_patches,
        "vision_dim": width,
        "inject": "embed",
        "resample": "perceiver",
        "media_tokens": num_tokens,
        "resample_depth": depth,
        "resample_heads": num_heads,
        "resample_head_width": head_width,
        "resample_width": width,
    }


def _openflamingo_shapes(width: int, inner: int, depth: int, num_tokens: int) -> dict[str, torch.Size]:
    layer = {
        "0.norm_media.weight": [width],
        "0.norm_media.bias": [width],
        "0.norm_latents.weight": [width],
        "0.norm_latents.bias": [width],
        "0.to_q.weight": [inner, width],
        "0.to_kv.weight": [2 * inner, width],
        "0.to_out.weight": [width, inner],
        "1.0.weight": [width],
        "1.0.bias": [width],
        "1.1.weight": [4 * width, width],
        "1.3.weight": [width, 4 * width],
    }
    whole = {"latents": [num_tokens, width], "norm.weight": [width], "norm.bias": [width]}
    layers = {f"layers.{number}.{name}": shape for number in range(depth) for name, shape in layer.items()}
    return {name: torch.Size(shape) for name, shape in (whole | layers).items()}


def _our_name(name: str, parts: Mapping[str, str]) -> str:
    if name == "latents":
        return "latents.weight"
    if (layer := re.fullmatch(r"(?:blocks|layers)\.(\d+)\.(.+)\.(weight|bias)", name)) is None:
        return name.replace("layer_norm.", "norm.")  # the last one
    return f"blocks.{layer[1]}.{parts[layer[2]]}.{layer[3]}"
