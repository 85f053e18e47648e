"""Prefixes and log-probabilities of the decoding engine against transformers."""

from __future__ import annotations

import pytest
import torch

from mmcot.decoding.generation import generate_ids, generate_rows
from mmcot.models.cuda_graphs import StaticDecoder
from mmcot.models.step_decoder import StepDecoder
from mmcot.models.t5 import MultimodalT5Config, T5ForMultimodalGeneration

LIMIT = 12
SOURCES = [[5, 6, 7, 1], [8, 1], [9, 10, 11, 12, 13, 1], [14, 15, 1], [16, 17, 18, 1]]
PREFIXES = [(20, 21, 22), (), (23,), (24, 25, 26, 27, 28), (29, 30)]
OPTIONS = {"feature_shape": (1, 1), "max_new_tokens": LIMIT, "num_rows": 2, "eos_token_ids": [1]}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = MultimodalT5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0, pad_token_id=0
    )
    return T5ForMultimodalGeneration._from_config(config).eval()


def generate(model, **options):
    return generate_rows(model, SOURCES, [None] * len(SOURCES), **{**OPTIONS, **options})


def logits_of(model, source, ids):
    """Teacher-forced logits of transformers' own forward, [T, V]."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([[0, *ids[:-1]]])).logits[0]


def test_a_row_begins_with_its_prefix_and_continues_greedily(model):
    rows = generate(model, prefixes=PREFIXES)
    for source, prefix, row in zip(SOURCES, PREFIXES, rows, strict=True):
        assert tuple(row.ids[: len(prefix)]) == prefix and len(row.ids) <= LIMIT
        assert len(row.ids) == LIMIT or row.ids[-1] == 1
        chosen = logits_of(model, source, row.ids).argmax(dim=-1).tolist()
        assert row.ids[len(prefix) :] == chosen[len(prefix) :]


def test_log_probabilities_are_those_of_the_model_also_within_a_prefix(model):
    for source, row in zip(SOURCES, generate(model, prefixes=PREFIXES, with_log_probs=True), strict=True):
        expected = logits_of(model, source, row.ids).log_softmax(dim=-1)
        expected = expected.gather(1, torch.tensor(row.ids)[:, None])[:, 0]
        assert torch.allclose(torch.tensor(row.log_probs), expected, atol=1e-4)


def test_without_prefixes_the_ids_are_the_same_as_with_empty_ones(model):
    features = [None] * len(SOURCES)
    plain = generate_ids(model, SOURCES, features, **OPTIONS)
    assert plain == generate_ids(model, SOURCES, features, prefixes=[()] * len(SOURCES), **OPTIONS)
    assert all(row.log_probs == [] for row in generate(model))


def test_an_end_token_within_a_prefix_does_not_end_the_row(model):
    rows = generate(model, prefixes=[(1, 20), *PREFIXES[1:]])
    assert rows[0].ids[:2] == [1, 20] and len(rows[0].ids) > 2


def test_fixed_shapes_give_the_same_rows(model, monkeypatch):
    expected = [row.ids for row in generate(model, prefixes=PREFIXES)]

    def open_static(model, *, num_rows, **sizes):
        return StaticDecoder(StepDecoder(model, num_rows=num_rows, **sizes))

    monkeypatch.setattr(T5ForMultimodalGeneration, "open_decoder", open_static)
    assert [row.ids for row in generate(model, prefixes=PREFIXES)] == expected


@pytest.mark.parametrize(
    ("prefixes", "message"),
    [([()], "1 entries for 5 sources"), ([(2,) * LIMIT, (), (), (), ()], "12 tokens, max_new_tokens is 12")],
)
def test_prefixes_that_do_not_fit_are_refused(model, prefixes, message):
    with pytest.raises(ValueError, match=message):
        generate(model, prefixes=prefixes)
