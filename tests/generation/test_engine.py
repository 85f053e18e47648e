"""The engine's door: what one may ask of it, against transformers' own generate and forward."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch

from mmcot.decoding.engine import open_engine
from mmcot.decoding.requests import Request, Source, candidates
from mmcot.decoding.sampling import GREEDY, Sampling, draw_key, sample_tokens
from mmcot.models import cuda_graphs
from mmcot.models.step_decoder import StepDecoder
from mmcot.models.t5 import MultimodalT5Config, T5ForMultimodalGeneration
from mmcot.texts.tokenizer import train_tokenizer

LIMIT, SHAPE = 20, (3, 5)
WORDS = ["so", "the", "answer", "is", "magnet", "north", "pole", "iron", "(A)", "(B)", "because", "light"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    chance = random.Random(0)
    lines = [" ".join(chance.choices(WORDS, k=8)) for _ in range(200)]
    return train_tokenizer(lines, tmp_path_factory.mktemp("tokenizer"), vocab_size=330)


@pytest.fixture(scope="module")
def model(tokenizer):
    """Random weights whose texts vary and depend on the source."""
    torch.manual_seed(0)
    config = MultimodalT5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        pad_token_id=0,
        vision_num_patches=SHAPE[0],
        vision_dim=SHAPE[1],
        tie_word_embeddings=False,
    )
    model = T5ForMultimodalGeneration._from_config(config).eval()
    with torch.no_grad():
        model.lm_head.weight.copy_(model.shared.weight.roll(7, dims=0) * 0.5)
        model.lm_head.weight[1] *= 2.5  # so that texts end
        for block in model.decoder.block:
            block.layer[1].EncDecAttention.o.weight.mul_(3.0)
    return model


@pytest.fixture(scope="module")
def sources(tokenizer):
    chance = random.Random(1)
    texts = [" ".join(chance.choices(WORDS, k=chance.randint(1, 30))) for _ in range(14)]
    return [Source(tokenizer.encode(text)) for text in texts]


def open_(model, tokenizer, num_rows=4, **options):
    sizes = {"max_source_tokens": 200, "max_new_tokens": LIMIT, "feature_shape": SHAPE}
    return open_engine(model, tokenizer, num_rows=num_rows, **{**sizes, **options})


@pytest.fixture
def engine(model, tokenizer):
    return open_(model, tokenizer)


@pytest.fixture
def static(monkeypatch):
    """The decoder of a GPU, without graphs."""
    monkeypatch.setattr(
        T5ForMultimodalGeneration,
        "open_decoder",
        lambda model, *, num_rows, **sizes: cuda_graphs.StaticDecoder(model, num_rows=num_rows, **sizes),
    )


def transformers_ids(model, source, **options):
    ids = torch.tensor([list(source.ids)])
    options = {"max_new_tokens": LIMIT, "do_sample": False, "num_beams": 1, **options}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, 1:].tolist()


def ids_with_end(text):
    return [*text.ids, 1] if text.finish == "eos" else list(text.ids)


@pytest.mark.parametrize(
    "rules",
    [
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.6},
        {"no_repeat_ngram_size": 1},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 9},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "min_new_tokens": 12},
    ],
    ids=str,
)
def test_rules_choose_the_tokens_that_transformers_chooses(engine, model, sources, rules):
    own = {name: value for name, value in rules.items() if name != "min_new_tokens"}
    sampling, least = Sampling(**own), rules.get("min_new_tokens", 0)
    texts = engine.write([Request(source, sampling=sampling, min_new_tokens=least) for source in sources])
    expected = [transformers_ids(model, source, **rules) for source in sources]
    assert [ids_with_end(text) for text in texts] == expected
    plain = engine.write([Request(source) for source in sources])
    assert [text.ids for text in texts] != [text.ids for text in plain]


def test_texts_of_different_requests_stand_side_by_side(engine, sources):
    kinds = [
        {},
        {"sampling": Sampling(1.0, seed=3), "key": "a"},
        {"sampling": Sampling(0.0, repetition_penalty=1.5)},
        {"prefix": sources[0].ids[:3], "with_log_probs": True},
        {"sampling": Sampling(1.5, top_k=5), "key": "b", "min_new_tokens": 6},
        {"max_new_tokens": 3},
    ]
    requests = [Request(source, **kind) for source, kind in zip(sources, itertools.cycle(kinds), strict=False)]
    together = engine.write(requests)
    for request, text in zip(requests, together, strict=True):
        (alone,) = engine.write([request])
        assert (alone.ids, alone.text, alone.finish) == (text.ids, text.text, text.finish)
        assert alone.log_probs == pytest.approx(text.log_probs, abs=1e-5)


@pytest.mark.usefixtures("static")
def test_a_decoder_that_chooses_itself_gives_way_to_the_host_and_takes_over_again(model, tokenizer, sources):
    engine, plain = open_(model, tokenizer), [Request(source) for source in sources]
    expected = engine.write(plain)
    drawn = Request(sources[0], key="1", sampling=Sampling(1.0), max_new_tokens=4)
    mixed = engine.write([*plain[:3], drawn, *plain[3:6], drawn, *plain[6:]])
    assert [text for number, text in enumerate(mixed) if number not in (3, 7)] == expected
    assert mixed[3] == mixed[7] == engine.write([drawn])[0]


def test_candidates_differ_by_their_number_alone_and_are_the_same_on_every_engine(model, tokenizer, sources):
    request = Request(sources[0], key="1", sampling=Sampling(1.0, seed=5))
    eight = open_(model, tokenizer).write(candidates(request, 8))
    assert len({text.ids for text in eight}) > 4
    assert open_(model, tokenizer, num_rows=3).write(candidates(request, 8)[::-1])[::-1] == eight
    assert open_(model, tokenizer).write([request])[0] == eight[0]
    other_turn = [Request(sources[0], key="1", turn=1, candidate=n, sampling=request.sampling) for n in range(8)]
    assert open_(model, tokenizer).write(other_turn) != eight


def test_the_first_candidate_draws_by_the_qid_alone_and_goes_on_from_its_own_beginning(engine, sources):
    sampling = Sampling(1.0, seed=5)
    (text,) = engine.write([Request(sources[0], key="1", sampling=sampling, with_log_probs=True)])
    again = engine.write([Request(sources[0], key="1", sampling=sampling, prefix=text.ids[:4])])
    assert again[0].ids == text.ids
    assert draw_key("1") == "1" and len({draw_key("1", turn=t, candidate=c) for t in (0, 1) for c in (0, 1)}) == 4


def test_candidates_share_one_encoding_of_their_source(model, tokenizer, sources, monkeypatch):
    encoded, engine = [], open_(model, tokenizer)
    read = engine.rows.read
    engine.rows.read = engine.rows._waiting._read = lambda **inputs: (
        encoded.append(len(inputs["input_ids"])) or read(**inputs)
    )
    request = Request(sources[0], key="1", sampling=Sampling(1.0))
    engine.write(candidates(request, 8))
    assert encoded == [1]
    engine.write([*candidates(request, 3), *candidates(Request(sources[1], key="2", sampling=Sampling(1.0)), 3)])
    assert encoded == [1, 2]
    kept = Source(sources[0].ids, keep_states=True)
    for _ in range(3):
        engine.write([Request(kept)])
        engine.score([kept], [[5, 6]])
    assert encoded == [1, 2, 1]


def test_an_encoding_that_is_kept_is_that_of_its_own_engine(model, tokenizer, sources):
    torch.manual_seed(5)
    other = T5ForMultimodalGeneration._from_config(model.config).eval()
    kept = Source(sources[0].ids, keep_states=True)
    engines = [open_(model, tokenizer), open_(other, tokenizer), open_(model, tokenizer)]
    found = [(engine.write([Request(kept)]), engine.score([kept], [[5, 6]])) for engine in engines]
    assert found[0] == found[2] != found[1]
    assert found[1][0] == open_(other, tokenizer).write([Request(sources[0])])


def test_pictures_of_a_source_are_shared_and_change_its_texts(model, tokenizer, sources):
    noise = np.random.default_rng(0)
    engine = open_(model, tokenizer)
    seen = [Source(source.ids, noise.normal(size=(2, 5)).astype(np.float16) * 5) for source in sources]
    texts = engine.write([Request(source) for source in seen])
    assert texts != engine.write([Request(source) for source in sources])
    assert texts == [engine.write([Request(source)])[0] for source in seen]
    with pytest.raises(ValueError, match="1 of 2 sources have features; give all of them"):
        engine.write([Request(seen[0]), Request(sources[0])])


def test_stop_tokens_end_a_text_before_them(engine, sources):
    plain = engine.write([Request(source) for source in sources])
    token = max((text.ids for text in plain), key=len)[5]
    stopped = engine.write([Request(source, stop_token_ids=[token]) for source in sources])
    assert sum(text.finish == "stop" for text in stopped) > 0
    for before, after in zip(plain, stopped, strict=True):
        place = before.ids.index(token) if token in before.ids else None
        assert after.ids == before.ids[:place]
        assert (after.finish == "stop") == (place is not None)
        assert after.num_tokens == (before.num_tokens if place is None else place + 1)


def test_every_token_is_called_back_as_soon_as_it_is_known(engine, sources):
    heard: list[list[int]] = [[] for _ in sources]
    texts = engine.write([Request(source, on_token=ids.append) for source, ids in zip(sources, heard, strict=True)])
    assert heard == [ids_with_end(text) for text in texts]


@pytest.mark.parametrize("decoder", ["plain", "static"])
def test_texts_are_added_and_cancelled_while_others_are_written(model, tokenizer, sources, request, decoder):
    if decoder == "static":
        request.getfixturevalue("static")
    engine = open_(model, tokenizer)
    expected = engine.write([Request(source) for source in sources])
    first = engine.submit([Request(source) for source in sources[:6]])
    ended = engine.step()
    long = [writing for writing in first if writing.text is None]
    for writing in (long[0], long[-1]):
        engine.cancel(writing)
        assert writing.text.finish == "cancelled"
    later = engine.submit([Request(source) for source in sources[6:]])
    while engine.is_busy:
        ended += engine.step()
    assert {id(writing) for writing in ended} == {
        id(writing) for writing in [*first, *later] if writing not in (long[0], long[-1])
    }
    for writing, text in zip([*first, *later], expected, strict=True):
        assert writing.text == text or writing.text.finish == "cancelled"
    engine.cancel(later[0])  # it has ended
    assert later[0].text == expected[6]


def test_a_call_back_may_cancel_any_text(engine, sources):
    writings = []

    def end_all(token):
        for writing in writings:
            engine.cancel(writing)

    writings += engine.submit([Request(source, on_token=end_all) for source in sources[:4]])
    assert engine.step() == [] and not engine.is_busy
    assert [writing.text.finish for writing in writings] == ["cancelled"] * 4


def test_after_an_error_in_a_step_an_engine_that_is_cleared_writes_as_before(engine, sources, monkeypatch):
    expected = engine.write([Request(source) for source in sources])
    engine.submit([Request(source) for source in sources])
    with monkeypatch.context() as patch:
        patch.setattr(StepDecoder, "step", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    engine.clear()
    assert not engine.is_busy and engine.write([Request(source) for source in sources]) == expected


def test_rows_are_never_idle_while_texts_wait(model, tokenizer, sources):
    engine = open_(model, tokenizer, num_rows=3)
    engine.submit([Request(source) for source in sources[:5]])
    engine.submit([Request(source, max_new_tokens=2) for source in sources[5:9]])
    while engine.rows.num_waiting:
        before = engine.rows.num_row_steps
        engine.step()
        assert engine.rows.num_row_steps - before == 3


def logits_of(model, source, ids):
    with torch.no_grad():
        given = torch.tensor([[0, *ids[:-1]]])
        return model(input_ids=torch.tensor([list(source.ids)]), decoder_input_ids=given).logits[0]


def test_scores_are_the_log_probabilities_of_the_models_own_forward_and_of_writing(engine, model, sources):
    texts = engine.write([Request(source, with_log_probs=True) for source in sources])
    given = [ids_with_end(text) for text in texts]
    scores = engine.score(sources, given)
    for source, ids, text, scored in zip(sources, given, texts, scores, strict=True):
        expected = logits_of(model, source, ids).log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        assert scored == pytest.approx(expected.tolist(), abs=1e-5)
        assert scored == pytest.approx(text.log_probs, abs=1e-5)
        assert sum(scored) == pytest.approx(text.log_prob, abs=1e-4)


@pytest.mark.parametrize(
    ("number", "texts", "message"),
    [(2, [[5]], "2 sources are given for 1 texts"), (2, [[5], []], "text 1 has no tokens to score")],
)
def test_texts_that_cannot_be_scored_are_refused(engine, sources, number, texts, message):
    with pytest.raises(ValueError, match=message):
        engine.score(sources[:number], texts)


def test_beams_and_single_rows_are_written_by_one_call_in_the_order_of_the_requests(engine, model, sources):
    requests = [Request(source, num_beams=1 + 2 * (number % 2)) for number, source in enumerate(sources[:6])]
    texts = engine.write(requests)
    for request, text in zip(requests, texts, strict=True):
        assert ids_with_end(text) == transformers_ids(model, request.source, num_beams=request.num_beams)
    with pytest.raises(ValueError, match=r"3 requests have num_beams above 1 \(3\).*call write"):
        engine.submit(requests)


def test_an_end_token_that_a_minimum_forbids_is_not_chosen_and_texts_reach_it(engine, sources):
    texts = engine.write([Request(source, min_new_tokens=LIMIT) for source in sources])
    assert {(text.num_tokens, text.finish) for text in texts} == {(LIMIT, "length")}


def shares(logits, number=3000, **limits):
    uniform = [(place + 0.5) / number for place in range(number)]
    tokens = sample_tokens(torch.tensor([logits], dtype=torch.float64).expand(number, -1), uniform, **limits)
    return {token: tokens.count(token) / number for token in sorted(set(tokens))}


@pytest.mark.parametrize("size", [4, 900])
def test_top_k_top_p_and_min_p_keep_what_transformers_keeps(size):
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    generator = torch.Generator().manual_seed(size)
    logits = torch.randn(size, generator=generator, dtype=torch.float64) * (3 if size > 10 else 1)
    for top_k, top_p, min_p in itertools.product((0, 2, 300), (1.0, 0.6), (0.0, 0.2)):
        scores = TemperatureLogitsWarper(0.7)(None, logits[None])
        for warper in (
            TopKLogitsWarper(top_k) if top_k else None,
            TopPLogitsWarper(top_p) if top_p < 1 else None,
            MinPLogitsWarper(min_p) if min_p else None,
        ):
            scores = warper(None, scores) if warper else scores
        expected = scores[0].softmax(-1)
        found = shares(logits.tolist(), temperature=0.7, top_k=top_k, top_p=top_p, min_p=min_p)
        assert all(abs(expected[token].item() - share) < 2e-3 for token, share in found.items())
        assert sum(expected[token].item() for token in found) > 0.98
        kept = int((expected > 0).sum())
        assert len(found) <= kept and (kept > 50 or len(found) == kept)


def test_greedy_is_the_default():
    assert Sampling() == GREEDY and not GREEDY.has_rules
