"""Rows of a causal language model at positions of their own have the logits that the model computes without a cache.

Tolerances are shares of the largest logit. The tiny models' weights vary enough for texts that do not repeat.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from mmcot.decoding.engine import open_engine
from mmcot.decoding.generation import generate_ids
from mmcot.decoding.requests import Request, Source, candidates
from mmcot.decoding.rows import open_rows
from mmcot.decoding.sampling import Sampling
from mmcot.errors import InputError
from mmcot.models.causal import CausalLanguageModel
from mmcot.models.causal_decoder import Prompt

KINDS = ("llama", "qwen2", "opt", "gpt2")
VOCABULARY = 97
TOKENS: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
WIDE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LENGTHS = (3, 17, 1, 40, 16, 8, 33, 2, 150, 5)
LIMIT = 24


def make(kind: str, *, spread: float = 0.1, **options: Any) -> Any:
    torch.manual_seed(0)
    classes = {"llama": "Llama", "qwen2": "Qwen2", "opt": "OPT", "gpt2": "GPT2"}
    config_class = getattr(transformers, f"{classes[kind]}Config")
    if kind in ("llama", "qwen2"):
        config = config_class(**TOKENS, **WIDE, initializer_range=spread, **options)
    elif kind == "opt":
        own = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = config_class(**TOKENS, **own, word_embed_proj_dim=32, init_std=spread, **options)
    else:
        config = config_class(**TOKENS, n_embd=32, n_layer=2, n_head=4, initializer_range=2 * spread, **options)
    head = "LMHeadModel" if kind == "gpt2" else "ForCausalLM"
    return getattr(transformers, f"{classes[kind]}{head}")(config).eval()


def draw_prompts(lengths=LENGTHS):
    chance = random.Random(0)
    return [[chance.randrange(3, VOCABULARY) for _ in range(length)] for length in lengths]


def read(model: CausalLanguageModel, prompts) -> list[Prompt]:
    ids = torch.full((len(prompts), max(map(len, prompts))), 2)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)], mask[row, : len(prompt)] = torch.tensor(prompt), 1
    return model.read(input_ids=ids, attention_mask=mask)


def open_decoder(model: CausalLanguageModel, num_rows=6):
    return model.open_decoder(num_rows=num_rows, max_source_tokens=8, max_new_tokens=LIMIT)


def uncached(model, ids):
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]


class Rows:
    """Rows of a decoder with the ids that each has read, which are drawn, and the largest error of their logits."""

    def __init__(self, model) -> None:
        self.model, self.chance, self.error = model, random.Random(1), 0.0
        wrapped = CausalLanguageModel(model)
        self.prompts = draw_prompts()
        self.states = read(wrapped, self.prompts)
        self.decoder = open_decoder(wrapped)
        self.rows: list[tuple[list[int], list[int]]] = []

    def admit(self, places, sources) -> None:
        tokens = self.decoder.admit(places, [self.states[source] for source in sources])
        for place, source, token in zip(places, sources, tokens, strict=True):
            assert token == self.prompts[source][-1]
            self.rows[place : place + 1] = [(self.prompts[source], [token])]

    def move_last(self, to) -> None:
        self.rows[to] = self.rows.pop()
        self.decoder.move(len(self.rows), to=to, num_positions=len(self.rows[to][1]) - 1)

    def step(self) -> None:
        last = [read[-1] for _, read in self.rows]
        logits_BV = self.decoder.step(last, [len(read) - 1 for _, read in self.rows])
        assert logits_BV.shape == (len(self.rows), VOCABULARY)
        for logits_V, (prompt, read) in zip(logits_BV, self.rows, strict=True):
            expected_V = uncached(self.model, prompt + read[1:])
            self.error = max(self.error, float((logits_V - expected_V).abs().max() / expected_V.abs().max()))
            read.append(self.chance.randrange(3, VOCABULARY))


def run_through(model) -> float:
    """Rows that start together, are refilled at different times, and move to other places; returns the error."""
    rows = Rows(model)
    rows.admit([0, 1, 2, 3], [0, 1, 2, 3])
    for _ in range(5):
        rows.step()
    rows.admit([1], [4])
    rows.step()
    rows.admit([4, 5, 0], [5, 6, 7])
    for _ in range(3):
        rows.step()
    rows.move_last(to=2)
    rows.step()
    rows.admit([5, 3], [8, 9])  # the longest prompt, which needs more memory, and a short one
    for _ in range(4):
        rows.step()
    rows.move_last(to=0)
    rows.move_last(to=3)
    rows.step()
    return rows.error


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_at_positions_of_their_own_have_the_logits_of_the_uncached_forward(kind, attention):
    assert run_through(make(kind, attn_implementation=attention)) < 1e-6


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.bfloat16, 0.05), (torch.float16, 0.005)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_agree_in_other_types_as_far_as_these_round(kind, dtype, tolerance):
    assert run_through(make(kind).to(dtype)) < tolerance


@pytest.mark.parametrize("num_rows", [1, 4, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_ids_are_generates_one_prompt_at_a_time(kind, num_rows):
    model, prompts = make(kind, spread=0.3), draw_prompts()
    ours = generate_ids(
        CausalLanguageModel(model),
        prompts,
        [None] * len(prompts),
        feature_shape=(1, 1),
        max_new_tokens=LIMIT,
        num_rows=num_rows,
        eos_token_ids=(1,),
    )
    for prompt, ids in zip(prompts, ours, strict=True):
        source = torch.tensor([prompt])
        theirs = model.generate(
            input_ids=source, attention_mask=torch.ones_like(source), do_sample=False, max_new_tokens=LIMIT
        )
        assert ids == theirs[0, len(prompt) :].tolist()
    assert np.mean([len(set(ids)) / len(ids) for ids in ours]) > 0.3 and len({tuple(ids) for ids in ours}) > 5


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_the_same_bit_for_bit_alone_and_among_others_at_other_places(kind):
    model = CausalLanguageModel(make(kind))
    states, texts = read(model, draw_prompts()), draw_prompts([6] * len(LENGTHS))

    def logits_of(source, places, others):
        """Logits at six positions of a source's row among rows of other sources."""
        decoder, found = open_decoder(model, num_rows=10), []
        num_rows = len(others) + 1
        beside = [row for row in range(num_rows) if row not in places]
        rows = [*places, *beside]
        first = dict(zip(rows, decoder.admit(rows, [states[one] for one in (source, *others)]), strict=True))
        for position in range(6):
            token = [texts[source][position - 1] if row in places else 7 for row in range(num_rows)]
            if position == 0:
                token = [first[row] for row in range(num_rows)]
            found.append(decoder.step(token, [position] * num_rows)[places[0]])
        return torch.stack(found)

    for source in range(len(LENGTHS)):
        others = [other for other in range(len(LENGTHS)) if other != source]
        alone = logits_of(source, [0], [])
        assert torch.equal(alone, logits_of(source, [0], others[:1]))
        assert torch.equal(alone, logits_of(source, [9], others))
        assert torch.equal(alone, logits_of(source, [3], others[::-1][:5]))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_of_a_prompt_is_the_same_bit_for_bit_alone_and_among_others(kind):
    model, prompts = CausalLanguageModel(make(kind)), draw_prompts([*LENGTHS, 16, 15, 3, 149])
    for prompt, among in zip(prompts, read(model, prompts), strict=True):
        (alone,) = read(model, [prompt])
        assert alone.last_token == among.last_token == prompt[-1] and alone.num_read == len(prompt) - 1
        for ours, theirs in zip(alone.keys_values, among.keys_values, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_rows_of_one_prompt_share_what_was_read_and_go_their_own_ways(monkeypatch):
    model, (prompt,) = make("llama"), draw_prompts([20])
    wrapped = CausalLanguageModel(model)
    (shared,) = read(wrapped, [prompt])
    decoder, calls = open_decoder(wrapped), []
    monkeypatch.setattr(type(model), "forward", lambda *_, **__: calls.append(1))
    tokens = decoder.admit([0, 1, 2], [shared, shared, shared])
    monkeypatch.undo()
    assert tokens == [prompt[-1]] * 3 and not calls
    decoder.step(tokens, [0, 0, 0])
    logits_BV = decoder.step([5, 6, 7], [1, 1, 1])
    for token, logits_V in zip([5, 6, 7], logits_BV, strict=True):
        expected_V = uncached(model, [*prompt, token])
        assert (logits_V - expected_V).abs().max() < 1e-6 * expected_V.abs().max()


def test_a_row_that_held_values_that_are_not_finite_is_clean_for_the_next_prompt():
    model = CausalLanguageModel(make("llama"))
    short, long = read(model, draw_prompts([5, 30]))
    broken = Prompt(tuple((k * float("nan"), v * float("nan")) for k, v in long.keys_values), long.last_token)
    expected = open_decoder(model)
    expected_BV = expected.step(expected.admit([0, 1], [short, short]), [0, 0])
    decoder = open_decoder(model)
    decoder.step(decoder.admit([0, 1], [broken, broken]), [0, 0])
    decoder.admit([0], [short])
    decoder.move(0, to=1, num_positions=0)
    assert torch.equal(decoder.step([short.last_token] * 2, [0, 0]), expected_BV)


def test_the_given_model_keeps_its_modules_its_weights_and_its_attention():
    model = make("gpt2")
    before = {name: type(module) for name, module in model.named_modules()}
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    wrapped = CausalLanguageModel(model)
    decoder = open_decoder(wrapped)
    decoder.step(decoder.admit([0], read(wrapped, [[5, 6]])), [0])
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
    assert model.config._attn_implementation == "sdpa"
    assert {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")} == {"sdpa"}


def test_an_engine_writes_the_same_whatever_it_wrote_before():
    model, prompts = CausalLanguageModel(make("qwen2")), draw_prompts()
    rows = open_rows(model, num_rows=4, max_source_tokens=100_000_000, max_new_tokens=LIMIT)

    def write(order):
        chosen = [prompts[number] for number in order]
        options: dict[str, Any] = {"feature_shape": (1, 1), "max_new_tokens": LIMIT, "eos_token_ids": (1,)}
        return generate_ids(model, chosen, [None] * len(chosen), num_rows=4, rows=rows, **options)

    first = write(range(10))
    few = write([3, 8])
    assert write(range(10)) == first and few == [first[3], first[8]]


def test_beams_are_those_of_generate_one_prompt_at_a_time():
    model, prompts = make("llama"), draw_prompts(LENGTHS[:6])
    ids = torch.full((6, 40), 2)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)], mask[row, : len(prompt)] = torch.tensor(prompt), 1
    options: dict[str, Any] = {"num_beams": 3, "do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
    ours = CausalLanguageModel(model).generate(input_ids=ids, attention_mask=mask, **options)
    for prompt, row in zip(prompts, ours.tolist(), strict=True):
        source = torch.tensor([prompt])
        theirs = model.generate(input_ids=source, attention_mask=torch.ones_like(source), **options)
        assert row == theirs[0, len(prompt) - 1 :].tolist()


def other(name: str, **options: Any) -> Any:
    config_class, model_class = (getattr(transformers, f"{name}{end}", None) for end in ("Config", "ForCausalLM"))
    if name in ("T5", "Bert"):
        head = "ForConditionalGeneration" if name == "T5" else "LMHeadModel"
        model_class = getattr(transformers, f"{name}{head}")
    assert config_class and model_class
    return model_class(config_class(**(TOKENS | options))).eval()


SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "T5": (
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
        "is no decoder-only language model",
    ),
    "Bert": (SMALL | {"num_attention_heads": 4, "intermediate_size": 48}, "is no decoder-only language model"),
    "Mamba": (SMALL, "keeps a state instead of keys and values"),
    "Rwkv": (SMALL | {"attention_hidden_size": 32}, "keeps a state instead of keys and values"),
    "Bloom": ({"hidden_size": 32, "n_layer": 2, "n_head": 4}, "has a forward that does not take position_ids"),
    "Mistral": (WIDE | {"sliding_window": 8}, "has layers whose cache is DynamicSlidingWindowLayer, not DynamicLayer"),
    "Falcon": (SMALL | {"num_attention_heads": 4, "alibi": True}, "counts distances by the columns of the cache"),
    "GPTNeo": (
        {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
        "counts distances by the columns of the cache",
    ),
    "Roberta": (
        SMALL | {"num_attention_heads": 4, "intermediate_size": 48, "is_decoder": True},
        "gives a text other positions than 0, 1, 2",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_whose_rows_cannot_stand_at_positions_of_their_own_is_refused_by_name(name):
    options, reason = REFUSED[name]
    model = other(name, **options)
    with pytest.raises(InputError, match=rf"{type(model).__name__} {reason}.*; expected a causal language model"):
        CausalLanguageModel(model)


def test_a_mistral_without_a_window_is_taken():
    assert run_through(other("Mistral", **WIDE, sliding_window=None, initializer_range=0.1)) < 1e-6


def test_a_text_that_would_need_more_positions_than_the_model_learned_is_refused_before_it_begins():
    model = CausalLanguageModel(make("gpt2", n_positions=30))
    states = read(model, draw_prompts([7, 8]))
    decoder = open_decoder(model)
    assert len(decoder.admit([0], states[:1])) == 1
    with pytest.raises(InputError, match=r"prompt of 8 tokens and a text of 24 .* need 31 positions, the model has 30"):
        decoder.admit([1], states[1:])
    with pytest.raises(InputError, match=r"a prompt has 31 tokens, the model has 30 positions"):
        read(model, draw_prompts([31, 2]))
    assert len(read(model, draw_prompts([30]))) == 1


def test_a_prompt_without_tokens_is_refused():
    with pytest.raises(InputError, match="a prompt has no tokens, expected one at least"):
        CausalLanguageModel(make("llama")).read(input_ids=torch.tensor([[5]]), attention_mask=torch.tensor([[0]]))


def test_pictures_beside_a_prompt_are_refused():
    one = torch.ones(1, 1, dtype=torch.long)
    with pytest.raises(InputError, match="LlamaForCausalLM reads text alone, without vision_features"):
        CausalLanguageModel(make("llama")).read(input_ids=one, attention_mask=one, vision_features=torch.zeros(1, 4, 7))


class Words:
    """A tokenizer whose words are the ids."""

    eos_token_id = 1

    def decode(self, ids, **options):
        return " ".join(map(str, ids))


def open_causal_engine(model, num_rows=4):
    return open_engine(
        CausalLanguageModel(model), Words(), num_rows=num_rows, max_source_tokens=8, max_new_tokens=LIMIT
    )


@pytest.mark.parametrize(
    "rules",
    [{"repetition_penalty": 1.6}, {"no_repeat_ngram_size": 2}, {"min_new_tokens": 9}, {"num_beams": 3}],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_asked_of_the_engine_gives_generates_ids(kind, rules):
    model = make(kind, spread=0.3)
    engine, sources = open_causal_engine(model), [Source(prompt) for prompt in draw_prompts()]
    sampling = Sampling(**{name: value for name, value in rules.items() if name in Sampling.__dataclass_fields__})
    own = {name: value for name, value in rules.items() if name not in Sampling.__dataclass_fields__}
    texts = engine.write([Request(source, sampling=sampling, **own) for source in sources])
    for source, text in zip(sources, texts, strict=True):
        ids = torch.tensor([source.ids])
        theirs = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=LIMIT, **{"do_sample": False, **rules}
        )[0, len(source.ids) :].tolist()
        assert list(text.ids) == (theirs[: theirs.index(1)] if 1 in theirs else theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_candidates_share_their_prompt_and_given_texts_are_scored(kind):
    model = make(kind)
    engine = open_causal_engine(model)
    requests = [
        Request(Source(prompt), key=str(number), sampling=Sampling(1.0), with_log_probs=True)
        for number, prompt in enumerate(draw_prompts())
    ]
    every = [each for request in requests for each in candidates(request, 3)]
    texts = engine.write(every)
    assert texts == open_causal_engine(model, num_rows=7).write(every)
    assert len({text.ids for text in texts}) > 25
    given = [[*text.ids, 1] if text.finish == "eos" else list(text.ids) for text in texts]
    scores = engine.score([request.source for request in every], given)
    for request, ids, text, scored in zip(every, given, texts, scores, strict=True):
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([[*request.source.ids, *ids[:-1]]]), use_cache=False).logits[0]
        expected = logits[len(request.source.ids) - 1 :].log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        assert scored == pytest.approx(expected.tolist(), abs=1e-4)
        assert scored == pytest.approx(text.log_probs, abs=1e-4)
