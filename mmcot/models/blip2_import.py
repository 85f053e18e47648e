"""Reading BLIP-2 with a T5 (arXiv:2301.12597), as transformers' ``Blip2ForConditionalGeneration`` saves it.

    vision_model          the features of the name ``blip2``, made before training; not part of our model
    query_tokens, qformer the resampler ``qformer``, of its own width
    language_projection   the linear layer to the language model's width
    language_model        the T5

Its queries stand before the text, as our placeholders do. A difference of training alone: our Q-Former has no dropout.
"""

from __future__ import annotations

import pathlib
import re
from typing import Any

import torch

from mmcot.models.checkpoint_files import (
    EMBEDDING,
    OUTPUT_LAYER,
    CheckpointError,
    Weights,
    check_tensors,
    config_of,
    read_weights,
    shapes_of,
    without_copies,
)
from mmcot.models.media_attention import ACTIVATIONS
from mmcot.models.qformer import CROSS_EVERY, NORM_EPS
from mmcot.pretrained import opening

_CLASS = "Blip2ForConditionalGeneration"
_HOST = "language_model."
_BRIDGE = "encoder.bridge."

# Parts of its names and ours, in this order.
_NAMES = (
    (r"^query_tokens$", "resampler.queries.weight"),
    (r"^language_projection\.", "project."),
    (r"^qformer\.layernorm\.", "resampler.norm."),
    (r"^qformer\.encoder\.layer\.", "resampler.blocks."),
    (r"\.crossattention\.output\.LayerNorm\.", ".picture_norm."),
    (r"\.attention\.output\.LayerNorm\.", ".attention_norm."),
    (r"\.output_query\.LayerNorm\.", ".feed_forward_norm."),
    (r"\.intermediate_query\.dense\.", ".feed_forward.fc1."),
    (r"\.output_query\.dense\.", ".feed_forward.fc2."),
    (r"\.attention\.output\.dense\.", ".attention.out_proj."),
    (r"\.crossattention\.output\.dense\.", ".picture_attention.out_proj."),
    (r"\.crossattention\.attention\.(query|key|value)\.", r".picture_attention.\1."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attention.\1."),
    (r"\.query\.", ".q_proj."),
    (r"\.key\.", ".k_proj."),
    (r"\.value\.", ".v_proj."),
)


def read_blip2(settings: dict[str, Any], source: pathlib.Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """Read a folder of BLIP-2.

    Returns:
        our configuration, and our state dict without copies, of one floating type.

    Raises:
        CheckpointError: it is of another class, its language model is no T5, its Q-Former is another than the
            published one, or a tensor is missing, unexpected or of another shape.
    """
    config = _read_config(settings, source)
    weights = _with_output_layer(
        without_copies(read_weights(source), is_tied=config.text_config.scale_decoder_outputs, prefix=_HOST), config
    )
    check_tensors(weights, _expected(config))
    state = {_our_name(name): tensor for name, tensor in weights.state.items() if not name.startswith("vision_model.")}
    state[f"{_BRIDGE}resampler.queries.weight"] = state[f"{_BRIDGE}resampler.queries.weight"][0]
    if len({tensor.dtype for tensor in state.values()}) > 1:  # transformers keeps the Q-Former in float32
        state = {name: tensor.float() for name, tensor in state.items()}
    return _our_config(config), state


def _read_config(settings: dict[str, Any], source: pathlib.Path) -> Any:
    """The configuration, checked for what our model computes in the same way."""
    from transformers import Blip2Config

    if (found := settings.get("architectures")) != [_CLASS]:
        raise CheckpointError(f"{source / 'config.json'} names the architectures {found}, expected [{_CLASS!r}]")
    host = (settings.get("text_config") or {}).get("model_type", "opt")
    if host != "t5":
        raise CheckpointError(
            f"the language model of {source} is of the kind {host!r}, a causal one such as OPT, which is not supported "
            "yet; give a BLIP-2 with a T5, such as Salesforce/blip2-flan-t5-xl"
        )
    with opening(source, "the configuration of BLIP-2"):
        config: Any = Blip2Config.from_pretrained(source, trust_remote_code=False)
    qformer = config.qformer_config
    for name, value, expected in (
        ("intermediate_size", qformer.intermediate_size, [4 * qformer.hidden_size]),
        ("hidden_act", qformer.hidden_act, [*ACTIVATIONS]),
        ("layer_norm_eps", qformer.layer_norm_eps, [NORM_EPS]),
        ("cross_attention_frequency", qformer.cross_attention_frequency, [CROSS_EVERY]),
        ("use_qformer_text_input", qformer.use_qformer_text_input, [False]),
    ):
        if value not in expected:
            raise CheckpointError(
                f"qformer_config.{name} in {source / 'config.json'} is {value!r}, the Q-Former here has "
                f"{' or '.join(map(repr, expected))}; such a Q-Former is not supported"
            )
    return config


def _with_output_layer(weights: Weights, config: Any) -> Weights:
    """The weights with an output layer where the T5 does not scale its outputs: there ours has one of its own."""
    shared, output = _HOST + EMBEDDING, _HOST + OUTPUT_LAYER
    if config.text_config.scale_decoder_outputs or output in weights.state or shared not in weights.state:
        return weights
    return Weights(weights.state | {output: weights.state[shared]}, weights.path)


def _expected(config: Any) -> dict[str, torch.Size]:
    from transformers import Blip2ForConditionalGeneration

    with torch.device("meta"):
        expected = shapes_of(Blip2ForConditionalGeneration(config))
    if config.text_config.scale_decoder_outputs:
        return expected
    return expected | {_HOST + OUTPUT_LAYER: expected[_HOST + EMBEDDING]}


def _our_name(name: str) -> str:
    if name.startswith(_HOST):
        return name.removeprefix(_HOST)
    for pattern, ours in _NAMES:
        name = re.sub(pattern, ours, name)
    return _BRIDGE + name


def _our_config(config: Any) -> Any:
    vision, qformer, text = config.vision_config, config.qformer_config, config.text_config
    settings = text.to_dict() | {"tie_word_embeddings": text.scale_decoder_outputs}
    if settings.get("decoder_start_token_id") is None:
        settings["decoder_start_token_id"] = settings["pad_token_id"]  # of every T5
    return config_of(
        settings,
        {
            "vision_num_patches": (vision.image_size // vision.patch_size) ** 2 + 1,  # with the class token
            "vision_dim": vision.hidden_size,
            "inject": "embed",
            "resample": "qformer",
            "media_tokens": config.num_query_tokens,
            "resample_depth": qformer.num_hidden_layers,
            "resample_heads": qformer.num_attention_heads,
            "resample_width": qformer.hidden_size,
            "resample_activation": qformer.hidden_act,
        },
    )
