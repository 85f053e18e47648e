"""Every published T5 is a host for media tokens: its own parts keep their names and shapes."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from mmcot.models.opening import DEFAULT, check_start, model_class

# Of the public configurations: d_model, d_kv, d_ff, layers, heads; and the published number of parameters.
V1_0 = {
    "t5-small": ((512, 64, 2048, 6, 8), 60_506_624),
    "t5-base": ((768, 64, 3072, 12, 12), 222_903_552),
    "t5-large": ((1024, 64, 4096, 24, 16), 737_668_096),
    "t5-3b": ((1024, 128, 16384, 24, 32), 2_851_598_336),
    "t5-11b": ((1024, 128, 65536, 24, 128), 11_307_321_344),
}
FLAN = {  # and T5 v1.1, which has the same sizes
    "flan-t5-small": ((512, 64, 1024, 8, 6), 76_961_152),
    "flan-t5-base": ((768, 64, 2048, 12, 12), 247_577_856),
    "flan-t5-large": ((1024, 64, 2816, 24, 16), 783_150_080),
    "flan-t5-xl": ((2048, 64, 5120, 24, 32), 2_849_757_184),
    "flan-t5-xxl": ((4096, 64, 10240, 24, 64), 11_135_332_352),
}
MEDIA = {
    "vision_num_patches": 257,
    "vision_dim": 1408,
    "inject": "embed",
    "resample": "qformer",
    "media_tokens": 32,
    "resample_depth": 12,
    "resample_heads": 12,
    "resample_width": 768,
}


def published_config(name):
    sizes = dict(zip(("d_model", "d_kv", "d_ff", "num_layers", "num_heads"), (V1_0 | FLAN)[name][0], strict=True))
    own = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False} if name in FLAN else {}
    tokens = {"vocab_size": 32128, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    return {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", **tokens, **sizes, **own}


@pytest.mark.parametrize("name", V1_0 | FLAN)
def test_a_published_t5_has_its_own_parts_beside_a_bridge(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(published_config(name)))
    check_start(DEFAULT, str(tmp_path), media=MEDIA)
    kind = model_class(DEFAULT)
    config = kind.config_class.from_pretrained(tmp_path, **MEDIA)
    with torch.device("meta"):
        ours = {name: p.shape for name, p in kind(config).named_parameters()}
        plain = {
            n: p.shape for n, p in T5ForConditionalGeneration(T5Config(**published_config(name))).named_parameters()
        }
    bridge = {name for name in ours if name.startswith("encoder.bridge.")}
    own_output = {"lm_head.weight": ours["shared.weight"]} if name in FLAN else {}  # transformers would tie it
    assert {name: ours[name] for name in ours.keys() - bridge} == plain | own_output
    assert sum(ours[name].numel() for name in ours.keys() - bridge) == (V1_0 | FLAN)[name][1]
    assert ours["encoder.bridge.project.weight"] == (config.d_model, 768)
