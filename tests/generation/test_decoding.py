"""The decoding engine against transformers' generate, on tiny models that were trained for seconds.

The models know 24 pairs of random words by heart: they write distinct tokens and end by
themselves, which a model of random weights does not.
"""

from __future__ import annotations

import random
import types

import numpy as np
import pytest
import torch

from mmcot.decoding import sampling
from mmcot.decoding.engine import open_engine
from mmcot.decoding.generation import generate_ids
from mmcot.decoding.requests import Request, Source
from mmcot.decoding.rows import Rows, open_rows
from mmcot.decoding.sampling import Sampling, draw_uniform, sample_tokens
from mmcot.decoding.source_batches import batch_sources
from mmcot.models import cuda_graphs
from mmcot.models import decoder_layers as decoding
from mmcot.models.t5 import MultimodalT5Config, T5ForMultimodalGeneration
from mmcot.texts.encoding import collate, encode_pair
from mmcot.texts.tokenizer import train_tokenizer

WORDS = [
    "solution",
    "because",
    "the",
    "magnet",
    "attracts",
    "iron",
    "poles",
    "repel",
    "so",
    "answer",
    "is",
    "north",
    "south",
    "light",
    "plant",
    "water",
    "rock",
    "heat",
]
SHAPE, LIMIT, ROWS = (5, 7), 40, 4
VARIANTS = {
    "relu_tied": {"feed_forward_proj": "relu", "tie_word_embeddings": True, "d_kv": 16},
    "gated_untied": {
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "num_decoder_layers": 1,
        "d_kv": 24,
    },
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_pairs(chance):
    def words(least, most):
        return " ".join(chance.choice(WORDS) for _ in range(chance.randint(least, most)))

    return [(words(1, 40), words(3, 24)) for _ in range(24)]


@pytest.fixture(scope="module", params=VARIANTS)
def trained(request, tmp_path_factory):
    """A fused model that knows its 24 pairs, with pictures and without."""
    pairs = make_pairs(random.Random(0))
    tokenizer = train_tokenizer(
        [text for pair in pairs for text in pair], tmp_path_factory.mktemp("tokenizer"), vocab_size=340
    )
    encoded = [encode_pair(tokenizer, *pair, max_source_tokens=200, max_target_tokens=200) for pair in pairs]
    noise = np.random.default_rng(0)
    pictures = [noise.normal(size=(number % 6, 7)).astype(np.float16) for number in range(24)]
    torch.manual_seed(0)
    config = MultimodalT5Config(
        vocab_size=len(tokenizer),
        d_model=64,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        vision_num_patches=SHAPE[0],
        vision_dim=SHAPE[1],
        **VARIANTS[request.param],
    )
    model = T5ForMultimodalGeneration(config)
    if not config.is_tied:
        model.lm_head.weight.data.normal_(std=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    batches = [collate(encoded, kind, feature_shape=SHAPE, pad_token_id=0) for kind in (pictures, [None] * 24)]
    for step in range(110):
        model(**batches[step % 2]).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    # Known sources, the same without their end, and lengths of 1 and 150 tokens.
    sources = [list(pair.source_ids) for pair in encoded] + [list(pair.source_ids[:-1]) for pair in encoded[:6]]
    sources += [[1], sources[0][:2], (sources[1] * 150)[:150]]
    return types.SimpleNamespace(
        model=model.eval(), tokenizer=tokenizer, sources=sources, pictures=(pictures * 2)[: len(sources)]
    )


def write(trained, features=None, order=None, *, sources=None, num_rows=ROWS, limit=LIMIT, **options):
    sources = trained.sources if sources is None else sources
    order = range(len(sources)) if order is None else order
    features = [None] * len(sources) if features is None else features
    options = {"eos_token_ids": [1], **options}
    return generate_ids(
        trained.model,
        [sources[i] for i in order],
        [features[i] for i in order],
        feature_shape=SHAPE,
        max_new_tokens=limit,
        num_rows=num_rows,
        **options,
    )


def reference(model, source, picture=None, limit=LIMIT):
    """transformers' ids for one prompt and the inputs of that call."""
    inputs = {"input_ids": torch.tensor([source]), "attention_mask": torch.ones(1, len(source), dtype=torch.long)}
    if picture is not None:
        padded = np.zeros((1, *SHAPE), dtype=np.float32)
        padded[0, : len(picture)] = picture
        inputs["vision_features"] = torch.from_numpy(padded).to(model.dtype)
    return model.generate(**inputs, max_new_tokens=limit, do_sample=False, num_beams=1)[0, 1:].tolist(), inputs


def assert_equal_to_generate(trained, ours, features=None, limit=LIMIT):
    """Equal ids, or a first difference where the two best logits are within 1e-4."""
    for number, ids in enumerate(ours):
        theirs, inputs = reference(trained.model, trained.sources[number], features and features[number], limit)
        if ids != theirs:
            place = next(i for i, (a, b) in enumerate(zip(ids, theirs, strict=False)) if a != b)
            logits = trained.model(**inputs, decoder_input_ids=torch.tensor([[0, *ids[:place]]])).logits[0, -1]
            best = logits.topk(2).values
            assert best[0] - best[1] < 1e-4, f"prompt {number}, token {place}: {ids} against {theirs}"


@pytest.mark.parametrize("with_pictures", [True, False], ids=["pictures", "text"])
def test_greedy_ids_are_generates_while_rows_are_refilled(trained, with_pictures, monkeypatch):
    refilled, begin = [], Rows._begin

    def count(rows, places, given):
        if max(places) < len(rows._rows):
            refilled.extend(places)
        begin(rows, places, given)

    monkeypatch.setattr(Rows, "_begin", count)
    features = trained.pictures if with_pictures else None
    ours = write(trained, features)
    assert len(refilled) == len(trained.sources) - ROWS
    known = ours[:24]  # the proof is worth something: texts end by themselves and are no loops
    assert sum(ids[-1] == 1 for ids in known) >= 18
    assert np.mean([len(set(ids)) / len(ids) for ids in known]) > 0.5
    assert len({tuple(ids) for ids in known}) >= 18
    assert len({len(ids) for ids in known}) > 5
    with torch.inference_mode():
        assert_equal_to_generate(trained, ours, features)


def test_pictures_change_what_is_written(trained):
    other = [picture + 3 for picture in trained.pictures]
    assert write(trained, trained.pictures) != write(trained, other)


def test_the_limit_cuts_rows_as_generate_does_and_may_differ_from_row_to_row(trained):
    ours = write(trained, limit=5)
    assert max(map(len, ours)) == 5
    with torch.inference_mode():
        assert_equal_to_generate(trained, ours, limit=5)
    whole = write(trained)
    limits = [1 + number % 7 for number in range(len(whole))]
    assert write(trained, limit=limits) == [ids[:limit] for ids, limit in zip(whole, limits, strict=True)]


def test_rows_in_all_and_one_row_at_a_time_write_the_same(trained):
    assert write(trained, num_rows=1) == write(trained, num_rows=100) == write(trained, num_rows=7)


@pytest.fixture
def static(monkeypatch):
    """The decoder of a GPU, without graphs; several widths within the limit. Returns the decoders that were opened."""
    opened = []

    def open_static(model, *, num_rows, max_source_tokens, max_new_tokens):
        sizes = {"max_source_tokens": max_source_tokens + 5, "max_new_tokens": max_new_tokens}
        opened.append(cuda_graphs.StaticDecoder(model, num_rows=num_rows, **sizes))
        return opened[-1]

    monkeypatch.setattr(cuda_graphs, "WIDTH_STEP", 16)
    monkeypatch.setattr(T5ForMultimodalGeneration, "open_decoder", open_static)
    return opened


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_pictures", [True, False], ids=["pictures", "text"])
def test_tokens_that_the_decoder_chooses_itself_are_those_that_the_host_chooses(
    trained, monkeypatch, request, with_pictures, dtype
):
    features = trained.pictures if with_pictures else None
    try:
        trained.model.to(dtype)
        plain = write(trained, features)
        static = request.getfixturevalue("static")
        monkeypatch.setattr(cuda_graphs.StaticDecoder, "step", lambda *arguments: pytest.fail("the host chose"))
        ours = write(trained, features)
        num_equal = sum(a == b for a, b in zip(ours, plain, strict=True))
        # In bfloat16 other widths of the attention round otherwise, as another number of rows does.
        assert num_equal == len(plain) if dtype == torch.float32 else num_equal >= 0.7 * len(plain)
        assert {width for width, _, _ in static[0]._steps} == {16, 32, 40}
    finally:
        trained.model.to(torch.float32)


def test_rows_that_end_between_two_looks_are_cut_there_by_end_limit_and_stop_string(trained, request):
    limits = [1 + number % 13 for number in range(len(trained.sources))]
    plain = write(trained, limit=limits), texts_of(trained, stop=["agnet", " so"])
    request.getfixturevalue("static")
    assert (write(trained, limit=limits), texts_of(trained, stop=["agnet", " so"])) == plain


def test_the_host_looks_at_a_gpus_tokens_every_eighth(trained, static, monkeypatch):
    looks, steps = [], []
    write_greedily = cuda_graphs.StaticDecoder.write_greedily
    compute = cuda_graphs.StaticDecoder._compute

    def count_look(self, num_tokens, **sizes):
        looks.append(num_tokens)
        return write_greedily(self, num_tokens, **sizes)

    def count_step(*arguments):
        steps.append(1)
        return compute(*arguments)

    monkeypatch.setattr(cuda_graphs.StaticDecoder, "write_greedily", count_look)
    monkeypatch.setattr(cuda_graphs.StaticDecoder, "_compute", count_step)
    write(trained)
    assert max(looks) == 8 and len(steps) == sum(looks) and len(looks) < 0.2 * len(steps)


def test_all_widths_share_one_tensor_of_logits_and_a_greedy_step_keeps_none(trained, static):
    decoder = trained.model.open_decoder(num_rows=2, max_source_tokens=20, max_new_tokens=LIMIT)
    decoder.admit([0], [torch.zeros(3, 64)])
    addresses = {decoder.step([0], [position]).data_ptr() for position in (0, 17)}
    decoder.admit([0], [torch.zeros(3, 64)])
    decoder.write_greedily(3, num_rows=1, num_positions=3)()
    assert len(addresses) == 1 and {key[::2] for key in static[0]._steps} == {(16, False), (32, False), (16, True)}
    with torch.inference_mode():
        assert all(step() is None for step in static[0]._steps.values())


@pytest.mark.parametrize("decoder", ["plain", "static"])
def test_each_admitted_row_is_given_the_token_that_it_reads_first(trained, request, decoder):
    if decoder == "static":
        request.getfixturevalue("static")
    decoder = trained.model.open_decoder(num_rows=4, max_source_tokens=20, max_new_tokens=LIMIT)
    start = trained.model.config.decoder_start_token_id
    assert decoder.admit([3, 1], [torch.zeros(3, 64), torch.zeros(5, 64)]) == [start, start]


def test_an_engine_writes_the_same_whatever_it_wrote_before(trained, static):
    rows = open_rows(trained.model, num_rows=9, max_source_tokens=200, max_new_tokens=LIMIT)
    first = write(trained, trained.pictures, rows=rows)
    num_graphs = len(static[0]._steps)
    few = write(trained, order=[3, 30], rows=rows, limit=7)
    again = write(trained, trained.pictures, rows=rows)
    assert first == again == write(trained, trained.pictures, num_rows=9)
    assert few == write(trained, order=[3, 30], limit=7)
    assert len(static[0]._steps) <= num_graphs + 2 and len(static) == 3


@pytest.mark.parametrize("decoder", ["plain", "static"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_source_that_is_not_finite_changes_no_other_whose_row_held_it(trained, request, decoder, value):
    if decoder == "static":
        request.getfixturevalue("static")
    rows = open_rows(trained.model, num_rows=ROWS, max_source_tokens=200, max_new_tokens=LIMIT)
    expected = write(trained, trained.pictures)
    damaged = [np.full((5, 7), value, dtype=np.float16) for _ in trained.sources]
    write(trained, damaged, order=[len(damaged) - 1, 0, 1, 2], rows=rows)
    assert write(trained, trained.pictures, rows=rows) == expected
    some = [damaged[n] if n % 5 == 0 else picture for n, picture in enumerate(trained.pictures)]
    ours = write(trained, some, rows=rows)  # their rows are refilled with others, and others move there
    assert all(ids == expected[n] for n, ids in enumerate(ours) if n % 5)


def test_an_engine_on_a_cpu_packs_its_weights_once_and_takes_memory_for_what_occurs(trained, monkeypatch):
    rows = open_rows(trained.model, num_rows=ROWS, max_source_tokens=100_000_000, max_new_tokens=LIMIT)
    monkeypatch.setattr(decoding, "pack_linear", lambda *arguments: pytest.fail("weights were packed again"))
    texts = [write(trained, order=order, rows=rows) for order in ([30], range(9), range(len(trained.sources)))]
    monkeypatch.undo()
    assert texts == [write(trained, order=order) for order in ([30], range(9), range(len(trained.sources)))]


def test_sources_and_texts_that_do_not_fit_an_engine_are_refused(trained, static):
    rows = open_rows(trained.model, num_rows=2, max_source_tokens=20, max_new_tokens=10)
    with pytest.raises(
        ValueError, match=r"max_new_tokens \(11\) must be at least 1 and at most the 10 that the engine"
    ):
        write(trained, order=[0, 1, 2], limit=11, rows=rows)
    with pytest.raises(ValueError, match=r"150 states, this decoder was opened for at most 25"):
        write(trained, order=[len(trained.sources) - 1], limit=10, rows=rows)


@pytest.mark.parametrize(("for_gpu", "dtype"), [(False, "float32"), (True, "float32"), (True, "bfloat16")])
def test_batches_hold_every_source_once_the_longest_first_and_are_bounded(for_gpu, dtype, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    chance = random.Random(0)
    lengths = [chance.randint(1, 512) for _ in range(200)] + [40_000]
    batches = list(
        batch_sources(
            [[2] * length for length in lengths],
            [None] * len(lengths),
            feature_shape=SHAPE,
            pad_token_id=0,
            dtype=getattr(torch, dtype),
            for_gpu=for_gpu,
        )
    )
    indices = [index for batch in batches for index in batch.indices]
    assert indices == sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    shapes = [tuple(batch.inputs["input_ids"].shape) for batch in batches]
    most = {"float32": 16_384, "bfloat16": 32_768}[dtype]
    assert not for_gpu or all(rows == 1 or rows * width <= most for rows, width in shapes)
    assert not for_gpu or max(rows * width for rows, width in shapes if rows > 1) > 0.9 * most
    assert (max(rows for rows, _ in shapes) > 64) == for_gpu
    for batch in batches:
        counts = batch.inputs["attention_mask"].sum(dim=1).tolist()
        assert counts == [lengths[index] for index in batch.indices]


def test_a_batch_that_does_not_fit_the_memory_is_encoded_in_halves_down_to_one_source(trained, monkeypatch):
    expected, tried = write(trained, trained.pictures), []
    open_whole, fits = T5ForMultimodalGeneration.open_reader, 3

    def open_reader(model):
        read = open_whole(model)

        def out_of_memory(**inputs):
            tried.append(len(inputs["input_ids"]))
            if tried[-1] > fits:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return read(**inputs)

        return out_of_memory

    monkeypatch.setattr(T5ForMultimodalGeneration, "open_reader", open_reader)
    assert write(trained, trained.pictures) == expected
    assert max(tried) == 16 and sum(number for number in tried if number <= 3) == len(expected)
    fits = 0
    with pytest.raises(torch.OutOfMemoryError):
        write(trained, trained.pictures)
    assert tried[-1] == 1


def test_without_onednns_private_operators_the_ids_are_the_same(trained, monkeypatch):
    packed = write(trained)
    monkeypatch.setattr(decoding.torch.ops, "mkldnn", types.SimpleNamespace())
    plain, calls = decoding.F.linear, []
    monkeypatch.setattr(decoding.F, "linear", lambda *arguments: calls.append(1) or plain(*arguments))
    assert write(trained) == packed
    assert len(calls) > 100


def test_a_packed_weight_multiplies_like_a_plain_one():
    torch.manual_seed(0)
    weight = torch.randn(48, 32)
    for num_rows in (1, 3, 64):
        states = torch.randn(num_rows, 32)
        torch.testing.assert_close(decoding.pack_linear(weight)(states), states @ weight.T)


def test_sampling_depends_on_seed_and_key_and_not_on_neighbours_rows_or_order(trained):
    keys = [f"q{number}" for number in range(len(trained.sources))]
    draw = Sampling(temperature=1.5, top_p=0.95, seed=3)
    together = write(trained, sampling=draw, keys=keys)
    assert together == write(trained, sampling=draw, keys=keys)
    order = random.Random(1).sample(range(len(keys)), len(keys))
    shuffled = write(trained, order=order, num_rows=9, sampling=draw, keys=[keys[i] for i in order])
    assert [together[i] for i in order] == shuffled
    alone = [write(trained, order=[i], sampling=draw, keys=[keys[i]])[0] for i in (0, 7, 30)]
    assert alone == [together[i] for i in (0, 7, 30)]
    assert together != write(trained, sampling=Sampling(1.5, 0.95, seed=4), keys=keys)
    assert together != write(trained, sampling=draw, keys=keys[::-1])
    assert together != write(trained)


def test_draws_follow_the_tempered_distribution():
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    uniform = [draw_uniform(7, f"q{number}", 0) for number in range(20_000)]
    logits = probabilities.log().expand(20_000, 4)
    for temperature, expected in ((1.0, probabilities), (2.0, probabilities.sqrt() / probabilities.sqrt().sum())):
        counts = np.bincount(sample_tokens(logits, uniform, temperature=temperature, top_p=1.0), minlength=4)
        chi_square = float(((counts - 20_000 * expected.numpy()) ** 2 / (20_000 * expected.numpy())).sum())
        assert chi_square < 16.3  # 99.9 % quantile at 3 degrees of freedom


def test_top_p_keeps_the_smallest_set_that_holds_so_much():
    logits = torch.tensor([[0.15, 0.5, 0.05, 0.3]], dtype=torch.float64).log().expand(999, 4)
    uniform = [(number + 0.5) / 999 for number in range(999)]
    for top_p, shares in ((0.6, {1: 5 / 8, 3: 3 / 8}), (0.3, {1: 1.0}), (0.9, {1: 50 / 95, 3: 30 / 95, 0: 15 / 95})):
        tokens = sample_tokens(logits, uniform, temperature=1.0, top_p=top_p)
        assert {token: tokens.count(token) / 999 for token in set(tokens)} == pytest.approx(shares, abs=0.002)


@pytest.mark.parametrize("scale", [0.0, 0.001, 3.0, 30.0])
def test_sorting_the_most_probable_tokens_alone_draws_what_sorting_all_draws(scale, monkeypatch):
    torch.manual_seed(0)
    logits = (torch.randn(50, 2000) * scale).round(decimals=1)  # rounded, so that many are equal
    uniform = [draw_uniform(0, "q", number) for number in range(50)]
    for top_p in (1e-9, 0.1, 0.5, 0.95, 1.0):
        drawn = sample_tokens(logits, uniform, temperature=0.8, top_p=top_p)
        with monkeypatch.context() as patch:
            patch.setattr(sampling, "MOST_PROBABLE", 2000)
            assert drawn == sample_tokens(logits, uniform, temperature=0.8, top_p=top_p)


def test_uniform_draws_are_of_seed_key_and_position_alone():
    assert draw_uniform(1, "a", 2) == draw_uniform(1, "a", 2)
    assert len({draw_uniform(s, k, p) for s in (1, 11) for k in ("a", "1/a") for p in (1, 11)}) == 8
    assert np.mean([draw_uniform(0, "a", position) for position in range(5000)]) == pytest.approx(0.5, abs=0.02)


def texts_of(trained, **options):
    engine = open_engine(trained.model, trained.tokenizer, num_rows=ROWS, max_source_tokens=200, max_new_tokens=LIMIT)
    return engine.write([Request(Source(source), **options) for source in trained.sources])


def test_texts_say_how_they_ended(trained):
    texts = texts_of(trained, max_new_tokens=8)
    for text, ids in zip(texts, write(trained, limit=8), strict=True):
        assert text.text == trained.tokenizer.decode(ids, skip_special_tokens=True)
        assert (text.num_tokens, text.finish) == (len(ids), "eos" if ids[-1] == 1 else "length")
    assert {text.finish for text in texts} == {"eos", "length"}


def test_a_stop_string_ends_a_text_before_it_and_saves_the_rest(trained):
    plain = texts_of(trained)
    stopped = texts_of(trained, stop=["agnet", " so"])
    assert sum(text.finish == "stop" for text in stopped) > 5
    for before, after in zip(plain, stopped, strict=True):
        places = [place for place in (before.text.find("agnet"), before.text.find(" so")) if place >= 0]
        if places:
            assert (after.text, after.finish) == (before.text[: min(places)], "stop")
            assert after.num_tokens <= before.num_tokens
        else:
            assert after == before
    assert sum(text.num_tokens for text in stopped) < sum(text.num_tokens for text in plain)


def test_a_stop_string_is_found_however_long_the_text_before_it_is(trained):
    whole = texts_of(trained)
    late = [text.text[-6:-2] for text in whole if text.num_tokens > 30]
    assert late
    stopped = texts_of(trained, stop=late[:1])
    assert [text.text for text in stopped] == [text.text.partition(late[0])[0] for text in whole]


def test_beam_search_is_transformers_own(trained):
    texts = texts_of(trained, num_beams=3)
    source = torch.tensor([trained.sources[0]])
    ids = trained.model.generate(
        source, attention_mask=torch.ones_like(source), max_new_tokens=LIMIT, num_beams=3, do_sample=False
    )
    assert texts[0].text == trained.tokenizer.decode(ids[0], skip_special_tokens=True)


def test_bfloat16_mostly_agrees_with_generate_and_its_private_operators_with_plain_ones(trained, monkeypatch):
    model = trained.model
    try:
        model.to(torch.bfloat16)
        ours = write(trained, trained.pictures)
        theirs = [
            reference(model, source, picture)[0]
            for source, picture in zip(trained.sources, trained.pictures, strict=True)
        ]
        assert sum(a == b for a, b in zip(ours, theirs, strict=True)) >= 0.7 * len(theirs)
        monkeypatch.setattr(decoding.torch.ops, "mkldnn", types.SimpleNamespace())
        plain = write(trained, trained.pictures)
        assert sum(a == b for a, b in zip(ours, plain, strict=True)) >= 0.7 * len(plain)
    finally:
        model.to(torch.float32)


def test_no_sources_give_no_texts(trained):
    engine = open_engine(trained.model, trained.tokenizer, num_rows=2, max_source_tokens=20, max_new_tokens=4)
    assert engine.write([]) == [] and not engine.is_busy and engine.step() == []


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sampling": Sampling(0.7)}, "needs a key"),
        ({"num_beams": 2, "stop": ["x"]}, r"num_beams \(2\) above 1 goes without stop"),
        ({"num_beams": 2, "prefix": [5]}, r"goes without prefix"),
        ({"num_beams": 2, "with_log_probs": True}, r"goes without with_log_probs"),
        ({"num_beams": 2, "sampling": Sampling(0.5), "key": "1"}, r"with no sampling, temperature is 0\.5"),
        ({"stop": "x"}, "list of strings"),
        ({"stop": [""]}, "empty string"),
        ({"candidate": 1}, r"candidate \(1\) needs sampling"),
        ({"prefix": [5] * LIMIT}, r"40 tokens, max_new_tokens is 40"),
        ({"min_new_tokens": 41}, r"min_new_tokens \(41\) is above max_new_tokens \(40\)"),
        ({"max_new_tokens": 0}, r"max_new_tokens \(0\)"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(trained, options, message):
    with pytest.raises(ValueError, match=message):
        texts_of(trained, **options)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": 1.0}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size"),
        ({"temperature": float("nan")}, "temperature"),
    ],
)
def test_values_of_sampling_out_of_their_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**values)


def test_a_generation_config_that_would_be_ignored_is_refused(trained, monkeypatch):
    monkeypatch.setattr(trained.model.generation_config, "repetition_penalty", 1.3)
    with pytest.raises(ValueError, match=r"repetition_penalty to 1\.3"):
        write(trained)
