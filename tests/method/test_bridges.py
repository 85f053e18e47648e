"""Bridges of a stranger: what a new file in the place of the gate has to do, and what it gets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmcot.decoding.generation import generate_ids
from mmcot.models.bridge import Bridge
from mmcot.models.fusion import BRIDGES
from mmcot.models.t5 import MultimodalT5Config, T5ForMultimodalGeneration

NUM_MEDIA = 3


class MediaTokens(Bridge):
    """Latents and the projected mean patch, before the text."""

    def __init__(self, *, d_model, vision_dim, gate_start=0.0):
        super().__init__()
        self.latents = nn.Parameter(torch.empty(NUM_MEDIA, d_model))
        self.norm = nn.LayerNorm(vision_dim)
        self.project = nn.Linear(vision_dim, NUM_MEDIA * d_model)

    def reset_parameters(self):
        nn.init.normal_(self.latents, std=0.02)

    def forward(self, text_BSD, text_mask_BS, vision_BPV, vision_mask_BP=None):
        media = self.project(self.norm(vision_BPV.mean(1))).view(len(text_BSD), NUM_MEDIA, -1) + self.latents
        mask = torch.cat([text_mask_BS.new_ones(len(text_BSD), NUM_MEDIA), text_mask_BS], 1)
        return torch.cat([media, text_BSD], 1), mask

    def num_states(self, num_tokens, num_patches):
        return num_tokens + NUM_MEDIA

    def forward_flops(self, source_lengths, num_patches):
        return 2 * self.project.in_features * self.project.out_features


class MeanPatch(Bridge):
    """The projected mean patch, added to every text state."""

    def __init__(self, *, d_model, vision_dim, gate_start=0.0):
        super().__init__()
        self.project = nn.Linear(vision_dim, d_model)

    def forward(self, text_BSD, text_mask_BS, vision_BPV, vision_mask_BP=None):
        return text_BSD + self.project(vision_BPV.mean(1, keepdim=True)), text_mask_BS

    def forward_flops(self, source_lengths, num_patches):
        return 2 * self.project.in_features * self.project.out_features


@pytest.fixture(params=[MediaTokens, MeanPatch])
def model(request, monkeypatch):
    monkeypatch.setitem(BRIDGES, "strange", request.param)
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    config = MultimodalT5Config(
        **sizes, vision_num_patches=5, vision_dim=7, fusion="strange", dropout_rate=0.0, decoder_start_token_id=0
    )
    model = T5ForMultimodalGeneration(config).eval()
    model.generation_config.eos_token_id = 1
    return model


def inputs_of(sources, pictures):
    width = max(map(len, sources))
    rows = [source + [0] * (width - len(source)) for source in sources]
    mask = [[1] * len(source) + [0] * (width - len(source)) for source in sources]
    return {
        "input_ids": torch.tensor(rows),
        "attention_mask": torch.tensor(mask),
        "vision_features": torch.tensor(np.stack(pictures)),
    }


def make_batch():
    noise = np.random.default_rng(0)
    sources = [noise.integers(2, 60, size=length).tolist() for length in (9, 4, 6, 1)]
    return sources, [noise.normal(size=(5, 7)).astype(np.float32) for _ in sources]


def test_it_trains_with_the_padding_of_a_batch_out_of_sight(model):
    sources, pictures = make_batch()
    labels = torch.randint(2, 60, (4, 5))
    together = model(**inputs_of(sources, pictures), labels=labels)
    together.loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.encoder.fusion.parameters())
    alone = model(**inputs_of(sources[1:2], pictures[1:2]), labels=labels[1:2]).logits
    torch.testing.assert_close(alone[0], together.logits[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_what_it_writes_is_what_transformers_generate_writes(model, num_beams):
    sources, pictures = make_batch()
    options = {"max_new_tokens": 12, "do_sample": False, "num_beams": num_beams}
    theirs = model.generate(**inputs_of(sources, pictures), **options)[:, 1:]
    if num_beams > 1:
        alone = [
            model.generate(**inputs_of([s], [p]), **options)[0, 1:] for s, p in zip(sources, pictures, strict=True)
        ]
    else:
        settings = {"feature_shape": (5, 7), "max_new_tokens": 12, "num_rows": 2, "eos_token_ids": [1]}
        alone = generate_ids(model, sources, pictures, **settings)
    for ours, other in zip(alone, theirs, strict=True):
        assert list(ours) == other[: len(ours)].tolist()


def test_it_counts_has_no_maps_and_nothing_to_watch(model):
    sources, pictures = make_batch()
    inputs = inputs_of([sources[0]], [pictures[0]])
    model.set_attn_implementation("eager")  # the counter does not know the CPU's fused attention
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs, labels=torch.ones(1, 5, dtype=torch.long))
    assert model.forward_flops([9], [5], num_patches=5) == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert model.attention_maps(**inputs) is None
    model.observe(inputs)
    assert model.watch() == {}


def test_it_starts_small_and_survives_saving(model, tmp_path):
    fusion = model.encoder.fusion
    assert 0.5 < fusion.project.weight.std().item() * 7**0.5 < 1.5 and fusion.project.bias.abs().max() == 0
    assert model.new_parts == ("encoder.bridge.",)
    model.save_pretrained(tmp_path)
    opened = T5ForMultimodalGeneration.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(opened[name], weight) for name, weight in model.state_dict().items())


def test_on_a_pretrained_language_model_it_starts_as_without_one(model, tmp_path):
    kept = {name: weight for name, weight in model.state_dict().items() if "bridge" not in name}
    model.save_pretrained(tmp_path, state_dict=kept)
    fusion = T5ForMultimodalGeneration.from_pretrained(tmp_path).encoder.fusion
    assert 0.5 < fusion.project.weight.std().item() * 7**0.5 < 1.5
    assert all(weight.abs().max() < 3 for weight in fusion.parameters())
    assert not isinstance(fusion, MediaTokens) or 0.01 < fusion.latents.std() < 0.03


def test_a_bridge_that_does_not_count_or_miscounts_is_refused(model, monkeypatch):
    with pytest.raises(NotImplementedError, match="must count its operations"):
        Bridge().forward_flops(np.ones(1), 5)
    sources, pictures = make_batch()
    monkeypatch.setattr(type(model.encoder.fusion), "num_states", lambda self, tokens, patches: tokens + 1)
    with pytest.raises(ValueError, match="num_states says 10 states"):
        model.encoder(**inputs_of(sources, pictures))
