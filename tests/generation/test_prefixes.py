"""Prefixes and log-probabilities of the decoding engine against transformers."""

from __future__ import annotations

import pytest
import torch

from mmcot.decoding.engine import open_engine
from mmcot.decoding.generation import generate_ids, generate_rows
from mmcot.decoding.requests import Request, Source
from mmcot.decoding.sampling import Sampling
from mmcot.models.cuda_graphs import StaticDecoder
from mmcot.models.t5 import MultimodalT5Config, T5ForMultimodalGeneration
from mmcot.texts.tokenizer import train_tokenizer

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


@pytest.mark.parametrize("prefix", [(1, 20), (20, 1)])
def test_an_end_token_in_a_prefix_does_not_end_the_row(model, prefix):
    rows = generate(model, prefixes=[prefix, *PREFIXES[1:]])
    assert tuple(rows[0].ids[:2]) == prefix and len(rows[0].ids) > 2


def test_fixed_shapes_give_the_same_rows(model, monkeypatch):
    expected = [row.ids for row in generate(model, prefixes=PREFIXES)]

    def open_static(model, *, num_rows, **sizes):
        return StaticDecoder(model, num_rows=num_rows, **sizes)

    monkeypatch.setattr(T5ForMultimodalGeneration, "open_decoder", open_static)
    assert [row.ids for row in generate(model, prefixes=PREFIXES)] == expected


@pytest.mark.parametrize(
    ("prefixes", "message"),
    [([()], "1 entries for 5 sources"), ([(2,) * LIMIT, (), (), (), ()], "12 tokens, max_new_tokens is 12")],
)
def test_prefixes_that_do_not_fit_are_refused(model, prefixes, message):
    with pytest.raises(ValueError, match=message):
        generate(model, prefixes=prefixes)


def test_rows_of_different_limits_and_prefixes_are_refilled_and_moved_without_a_trace(model):
    limits = [6, 1, 12, 8, 4]  # they end at different steps, so that places are refilled, then moved
    together = generate(model, prefixes=PREFIXES, max_new_tokens=limits, num_rows=3, with_log_probs=True)
    for index, row in enumerate(together):
        (alone,) = generate_rows(
            model,
            [SOURCES[index]],
            [None],
            **{**OPTIONS, "max_new_tokens": limits[index], "num_rows": 1},
            prefixes=[PREFIXES[index]],
            with_log_probs=True,
        )
        assert row.ids == alone.ids and len(row.ids) <= limits[index]
        assert row.log_probs == pytest.approx(alone.log_probs, abs=1e-4)


def test_a_sampled_text_that_is_given_its_own_beginning_continues_in_the_same_way(model):
    options = {"sampling": Sampling(1.0, 1.0, 3), "keys": [f"q{number}" for number in range(len(SOURCES))]}
    whole = [row.ids for row in generate(model, **options)]
    beginnings = [tuple(ids[: len(ids) // 2]) for ids in whole]
    assert [row.ids for row in generate(model, prefixes=beginnings, num_rows=3, **options)] == whole


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(["so the answer is (A). "] * 4, tmp_path_factory.mktemp("tokenizer"), vocab_size=280)


def write(model, tokenizer, prefix, **options):
    config = MultimodalT5Config(**{**model.config.to_dict(), "vocab_size": len(tokenizer)})
    torch.manual_seed(1)
    model = T5ForMultimodalGeneration._from_config(config).eval()
    engine = open_engine(model, tokenizer, num_rows=1, max_source_tokens=3, max_new_tokens=16)
    return engine.write([Request(Source([5, 6, 1]), prefix=prefix, **options)])[0]


def test_a_text_contains_its_prefix_and_the_log_probability_of_every_token(model, tokenizer):
    prefix = tokenizer.encode("so the", add_special_tokens=False)
    text = write(model, tokenizer, prefix, with_log_probs=True)
    assert text.text.startswith("so the") and len(text.log_probs) == text.num_tokens > len(prefix)
    assert all(value < 0 for value in text.log_probs)


def test_a_stop_string_counts_after_the_prefix_alone(model, tokenizer):
    prefix = tokenizer.encode("so the answer", add_special_tokens=False)
    free = write(model, tokenizer, prefix)
    stopped = write(model, tokenizer, prefix, stop=["answer"])
    assert stopped.text.startswith("so the answer") and free.text.startswith(stopped.text)
    new = free.text.removeprefix("so the answer")
    stop = new[3:5]
    assert write(model, tokenizer, prefix, stop=[stop]).text == free.text[: free.text.index(stop, len("so the answer"))]
