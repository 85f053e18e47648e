"""On a CPU a row's logits are the same, bit for bit, whatever rows are decoded beside it."""

from __future__ import annotations

import random

import pytest
import torch

from mmcot.models.gated_t5 import MediaOfSource
from mmcot.models.packed_linear import pack_linear
from mmcot.models.step_decoder import StepDecoder
from mmcot.models.t5 import T5ForMultimodalGeneration

VOCABULARY, WIDTH, NUM_MEDIA, LIMIT = 90, 64, 6, 40
SHAPE = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "d_kv": 16,
    "d_ff": 96,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
}
TEXT = [0, 5, 17, 80, 3, 3, 41, 9, 22, 60, 61, 2, 7, 7, 13, 88, 30, 31, 4, 6]  # longer than one window of 16


def make_model(kind, dtype=torch.float32):
    torch.manual_seed(0)
    vision = {"vision_num_patches": 10, "vision_dim": 12}
    if kind == "gated":
        vision |= {"inject": "layers", "resample": "perceiver", "media_tokens": 3, "max_pictures": 2}
    model = T5ForMultimodalGeneration.start(SHAPE, vision, pad_token_id=0, eos_token_id=1).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("gate.scale"):
            parameter.data.fill_(0.7)
    return model.to(dtype)


def make_states(kind, length, dtype=torch.float32, num_present=NUM_MEDIA):
    states_SD = torch.randn(length, WIDTH, dtype=dtype)
    if kind == "text":
        return states_SD
    return MediaOfSource(
        states_SD, torch.randn(NUM_MEDIA, WIDTH, dtype=dtype), torch.arange(NUM_MEDIA) >= NUM_MEDIA - num_present
    )


def others_of(kind, dtype, number):
    return [make_states(kind, 1 + 37 * n % 130, dtype, n % (NUM_MEDIA + 1)) for n in range(number)]


def logits_beside(model, states, others, place, chance):
    """The logits of ``TEXT`` in row ``place``, beside rows that have read any number of tokens before."""
    decoder = StepDecoder(model, num_rows=1 + len(others), max_new_tokens=LIMIT)
    rows = [*others[:place], states, *others[place:]]
    starts = [chance.randrange(LIMIT - len(TEXT)) for _ in rows]
    decoder.admit(range(len(rows)), rows)
    for position in range(max(starts)):
        decoder.step([chance.randrange(VOCABULARY) for _ in rows], [min(position, start) for start in starts])
    decoder.admit([place], [states])  # in place of a text that was begun
    found = []
    for position, token in enumerate(TEXT):
        tokens, positions = [chance.randrange(VOCABULARY) for _ in rows], [start + position for start in starts]
        tokens[place], positions[place] = token, position
        found.append(decoder.step(tokens, positions)[place])
    return torch.stack(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["text", "gated"])
def test_a_rows_logits_are_the_same_alone_and_beside_any_rows_at_any_place(kind, dtype):
    model, chance = make_model(kind, dtype), random.Random(0)
    for length in (1, 19, 64):
        states = make_states(kind, length, dtype, num_present=length % (NUM_MEDIA + 1))
        alone_TV = logits_beside(model, states, [], 0, chance)
        assert alone_TV.std() > 0.01
        for number, place in ((1, 1), (2, 0), (2, 2), (33, 0), (33, 20), (33, 33)):
            beside_TV = logits_beside(model, states, others_of(kind, dtype, number), place, chance)
            assert torch.equal(beside_TV, alone_TV), (length, number, place)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["text", "gated"])
def test_a_row_that_moves_continues_with_the_same_logits(kind, dtype):
    model, states = make_model(kind, dtype), make_states(kind, 50, dtype)
    alone_TV = logits_beside(model, states, [], 0, random.Random(0))
    decoder = StepDecoder(model, num_rows=4, max_new_tokens=LIMIT)
    decoder.admit(range(4), [*others_of(kind, dtype, 3), states])
    half = len(TEXT) // 2
    for position in range(half):
        decoder.step([8, 8, 8, TEXT[position]], [position] * 4)
    decoder.move(3, to=1, num_positions=half)
    for position in range(half, len(TEXT)):
        assert torch.equal(decoder.step([8, TEXT[position], 8], [position] * 3)[1], alone_TV[position])


@pytest.mark.parametrize("kind", ["text", "gated"])
def test_a_token_of_the_text_and_every_state_of_the_source_change_the_logits(kind):
    model, states = make_model(kind), make_states(kind, 20)
    first_TV = logits_beside(model, states, [], 0, random.Random(0))
    for part in states if kind == "gated" else [states]:
        for place in range(len(part)):
            if part.dtype != torch.bool:
                part[place] += 1.0
                changed_TV = logits_beside(model, states, [], 0, random.Random(0))
                part[place] -= 1.0
                assert (changed_TV - first_TV).abs().max() > 1e-4
    decoder = StepDecoder(model, num_rows=2, max_new_tokens=LIMIT)
    decoder.admit([0, 1], [states, make_states(kind, 20)])
    for position, token in enumerate(TEXT):
        last_V = decoder.step([token if position else 1, 8], [position] * 2)[0]
    assert (last_V - first_TV[-1]).abs().max() > 1e-4


def test_a_single_row_of_a_packed_weight_is_rounded_as_among_others():
    torch.manual_seed(0)
    apply, states_BD = pack_linear(torch.randn(512, 1408)), torch.randn(5, 1408)
    together = apply(states_BD)
    for row in range(5):
        assert torch.equal(apply(states_BD[row : row + 1]), together[row : row + 1])
        assert torch.equal(apply(states_BD[row]), together[row])
    assert apply(states_BD[:0]).shape == (0, 512)
