"""``open_reader`` of a fused T5: encoder and bridge with packed weights, beside a model that stays as it is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmcot.decoding.rows import open_rows
from mmcot.models import packed_modules
from mmcot.models.gated_t5 import MediaOfSource
from mmcot.models.t5 import T5ForMultimodalGeneration

SHAPE = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
KINDS = {
    "gate": {},
    "layers": {"inject": "layers", "resample": "perceiver", "media_tokens": 3, "max_pictures": 1},
    "embed": {"inject": "embed", "resample": "linear", "media_tokens": 5, "max_pictures": 1},
}


@pytest.fixture(params=KINDS)
def model(request):
    torch.manual_seed(0)
    vision = {"vision_num_patches": 5, "vision_dim": 12, **KINDS[request.param]}
    return T5ForMultimodalGeneration.start(SHAPE, vision, pad_token_id=0, eos_token_id=1).eval()


@pytest.fixture
def inputs():
    torch.manual_seed(1)
    ids_BS = torch.randint(2, 50, (3, 13))
    ids_BS[:, 1:6] = 0  # where ``embed`` puts the media of a picture; padding of its own for the other kinds
    mask_BS = torch.arange(13) < torch.tensor([13, 9, 6])[:, None]
    features_BPV = torch.randn(3, 5, 12)
    vision_mask_BP = torch.ones(3, 5, dtype=torch.bool)
    return {
        "input_ids": ids_BS,
        "attention_mask": mask_BS.long(),
        "vision_features": features_BPV,
        "vision_mask": vision_mask_BP,
    }


def parts_of(states):
    return list(states[:2]) if isinstance(states, MediaOfSource) else [states]


def test_the_reader_reads_what_the_model_reads_and_packs_each_linear_layer_once(model, inputs, monkeypatch):
    packed_weights, pack = [], packed_modules.pack_linear
    monkeypatch.setattr(packed_modules, "pack_linear", lambda w, b: packed_weights.append(id(w)) or pack(w, b))
    before = {name: type(module) for name, module in model.named_modules()}
    read = open_rows(model, num_rows=2, max_source_tokens=20, max_new_tokens=4).read
    with torch.inference_mode():
        for ours, expected in zip(read(**inputs), model.read(**inputs), strict=True):
            for our, part in zip(parts_of(ours), parts_of(expected), strict=True):
                torch.testing.assert_close(our, part, rtol=0, atol=2e-6)
    assert {name: type(module) for name, module in model.named_modules()} == before
    linears = [id(module.weight) for module in model.encoder.modules() if type(module) is nn.Linear]
    assert sorted(packed_weights) == sorted(linears)


def test_the_reader_computes_with_the_packed_layers_of_encoder_and_bridge(model, inputs, monkeypatch):
    used, apply = set(), packed_modules.PackedLinear.forward

    def note(module, states):
        used.add(id(module.weight))
        return apply(module, states)

    monkeypatch.setattr(packed_modules.PackedLinear, "forward", note)
    with torch.inference_mode():
        model.open_reader()(**inputs)
    assert used == {id(module.weight) for module in model.encoder.modules() if type(module) is nn.Linear}
