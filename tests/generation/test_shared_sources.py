"""Rows that are assigned to the same states, the same object, share one source."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from mmcot.models.cuda_graphs import StaticDecoder
from mmcot.models.decoder_layers import DecoderLayers
from mmcot.models.gated_t5 import MediaOfSource
from mmcot.models.row_attention import SourceCache
from mmcot.models.step_decoder import StepDecoder
from mmcot.models.t5 import T5ForMultimodalGeneration

SHAPE = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
VISION = {"vision_num_patches": 5, "vision_dim": 12, "media_tokens": 3, "max_pictures": 1}
PLACES = (0, 2, 3, 4, 6, 7, 9, 10)  # of the rows that share a source
NUM_ROWS, LIMIT = 11, 20


@pytest.fixture(scope="module", params=["text", "gated"])
def model(request):
    torch.manual_seed(0)
    vision = VISION | ({"inject": "layers", "resample": "perceiver"} if request.param == "gated" else {})
    model = T5ForMultimodalGeneration.start(SHAPE, vision, pad_token_id=0, eos_token_id=1).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("gate.scale"):
            parameter.data.fill_(0.7)
    return model


def make_states(model, length):
    states_SD = torch.randn(length, 32)
    is_gated = hasattr(model.decoder.block[0], "gated")
    return MediaOfSource(states_SD, torch.randn(3, 32), torch.ones(3, dtype=torch.bool)) if is_gated else states_SD


def copy_of(states):
    return MediaOfSource(*(part.clone() for part in states)) if isinstance(states, MediaOfSource) else states.clone()


def open_decoder(model, kind):
    if kind == "static":
        return StaticDecoder(model, num_rows=NUM_ROWS, max_source_tokens=40, max_new_tokens=LIMIT)
    return StepDecoder(model, num_rows=NUM_ROWS, max_new_tokens=LIMIT)


@pytest.fixture
def computed(monkeypatch):
    """The numbers of tokens whose keys and values were computed, call by call."""
    numbers, compute = [], DecoderLayers.source_keys_values

    def count(layers, states_SD):
        numbers.append(len(states_SD))
        return compute(layers, states_SD)

    monkeypatch.setattr(DecoderLayers, "source_keys_values", count)
    return numbers


def logits_of_steps(decoder, tokens_TB):
    steps = [decoder.step(tokens, [position] * NUM_ROWS) for position, tokens in enumerate(tokens_TB.tolist())]
    return torch.stack([logits_BV.clone() for logits_BV in steps])


@pytest.mark.parametrize("kind", ["step", "static"])
def test_rows_of_one_source_compute_it_once_and_write_as_rows_with_copies_of_it(model, kind, computed):
    shared, others = make_states(model, 30), [make_states(model, length) for length in (7, 40, 11)]
    rows = [shared if place in PLACES else others[(1, 5, 8).index(place)] for place in range(NUM_ROWS)]
    tokens_TB = torch.randint(0, 50, (18, NUM_ROWS))
    decoder = open_decoder(model, kind)
    decoder.admit(range(NUM_ROWS), rows)
    assert sum(computed) == 30 + 7 + 40 + 11
    ours = logits_of_steps(decoder, tokens_TB)
    decoder.admit(range(NUM_ROWS), [copy_of(states) for states in rows])
    assert sum(computed) == 88 + 8 * 30 + 7 + 40 + 11
    expected = logits_of_steps(decoder, tokens_TB)
    assert torch.equal(ours, expected) if kind == "step" else torch.allclose(ours, expected, atol=1e-6)
    assert (expected[-1, PLACES[0]] - expected[-1, 1]).abs().max() > 1e-3


def test_a_source_stays_for_later_rows_while_any_row_reads_it_and_no_longer(model, computed, monkeypatch):
    opened, open_cache = [], SourceCache.__init__

    def count(cache, *arguments):
        opened.append(weakref.ref(cache))
        open_cache(cache, *arguments)

    monkeypatch.setattr(SourceCache, "__init__", count)
    decoder, shared = open_decoder(model, "step"), make_states(model, 30)
    decoder.admit([0, 1, 2], [make_states(model, 5), shared, shared])
    decoder.admit([1, 3], [make_states(model, 6), shared])
    decoder.move(3, to=0, num_positions=0)
    decoder.admit([2, 3], [make_states(model, 7), make_states(model, 8)])
    decoder.admit([4], [shared])
    assert computed == [5, 30, 6, 7, 8]
    decoder.admit([0, 4], [make_states(model, 9), make_states(model, 10)])
    gc.collect()
    alive = [cache() for cache in opened if cache() is not None]
    assert sorted(cache.num_positions for cache in alive if cache.num_positions > 3) == [6, 7, 8, 9, 10]
    decoder.admit([1], [shared])  # no row reads it any more
    assert computed[-1] == 30


def test_a_decoder_keeps_keys_and_values_of_a_source_but_not_its_states(model):
    decoder, states = open_decoder(model, "step"), make_states(model, 30)
    reference = weakref.ref(states.text if isinstance(states, MediaOfSource) else states)
    decoder.admit([0], [states])
    del states
    gc.collect()
    assert reference() is None
    assert decoder.step([0], [0]).isfinite().all()
