"""Objectives: named sums with units, whose loss depends on no division into blocks."""

from __future__ import annotations

import types

import pytest
import torch

from launcher.stages.samples import Block
from launcher.training import engine_steps
from launcher.training.engine_steps import named_losses, optimizer_step
from launcher.training.throughput import Meter
from mmcot.models.loss import objective_named
from mmcot.models.t5 import MultimodalT5Config, T5ForMultimodalGeneration
from mmcot.texts.encoding import EncodedPair, collate

PAIRS = [EncodedPair((5, 6, 1), (7, 8, 9, 1), 0, 0), EncodedPair((5, 1), (7, 1), 0, 0), EncodedPair((6, 1), (1,), 0, 0)]


def two_parts(model, inputs, labels):
    """A mean over tokens, and one over questions."""
    logits = model(**inputs).logits
    text = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    first = logits[:, 0].square().mean(dim=-1).sum()
    return {"text": (text, "tokens"), "size": (first, "questions")}


class Engine(torch.nn.Module):
    """An engine of one rank that only accumulates gradients."""

    def __init__(self, module):
        super().__init__()
        self.module, self.device = module, torch.device("cpu")

    def forward(self, **inputs):
        return self.module(**inputs)

    def backward(self, loss, scale_wrt_gas):
        loss.backward()

    def step(self):
        pass


def run(blocks, monkeypatch, objective=two_parts, dummies=frozenset()):
    torch.manual_seed(0)
    config = MultimodalT5Config(
        vocab_size=16, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0, pad_token_id=0
    )
    engine = Engine(T5ForMultimodalGeneration._from_config(config))
    monkeypatch.setattr(engine_steps.dist, "all_reduce", lambda tensor: None)
    shape = {"feature_shape": (1, 1), "pad_token_id": 0, "decoder_start_token_id": 0}
    loaded = []
    for index, pairs in enumerate(blocks):
        tensors = collate(pairs, [None] * len(pairs), is_dummy=index in dummies, **shape)
        qids = () if index in dummies else tuple(str(number) for number in range(len(pairs)))
        loaded.append((index, Block(tensors, qids)))
    parts = optimizer_step(
        engine,
        types.SimpleNamespace(blocks=loaded, number=0),
        objective,
        seed=0,
        counts={"tokens": 7, "questions": 3},
        world_size=1,
        meter=Meter(peak_flops=1.0),
        observe=False,
    )
    return parts, torch.cat(
        [parameter.grad.flatten() for parameter in engine.parameters() if parameter.grad is not None]
    )


def test_parts_and_gradients_do_not_depend_on_the_division_into_blocks(monkeypatch):
    parts, gradients = run([PAIRS], monkeypatch)
    for blocks in ([PAIRS[:1], PAIRS[1:]], [PAIRS[2:], PAIRS[:2]], [[pair] for pair in PAIRS]):
        others, other_gradients = run(blocks, monkeypatch)
        assert others == pytest.approx(parts, rel=1e-5)
        assert torch.allclose(other_gradients, gradients, atol=1e-6)
    assert set(parts) == {"text", "size"} and parts["size"] > 0


def test_a_dummy_block_changes_neither_parts_nor_gradients(monkeypatch):
    parts, gradients = run([PAIRS], monkeypatch)
    with_dummy, other_gradients = run([PAIRS, PAIRS[:1]], monkeypatch, dummies={1})
    assert with_dummy == parts and torch.equal(other_gradients, gradients)


def test_labels_are_shifted_as_t5_shifts_them():
    config = MultimodalT5Config(vocab_size=16, d_model=8, num_layers=1, decoder_start_token_id=3, pad_token_id=0)
    model = T5ForMultimodalGeneration._from_config(config)
    batch = collate(PAIRS, [None] * 3, feature_shape=(1, 1), pad_token_id=0, decoder_start_token_id=3)
    assert torch.equal(batch["decoder_input_ids"], model._shift_right(batch["labels"]))


def test_each_part_is_logged_where_there_are_several():
    assert named_losses({"text": 2.0}, "loss") == {"loss": 2.0}
    assert named_losses({"a": 2.0, "b": 1.0}, "loss") == {"loss": 3.0, "loss_a": 2.0, "loss_b": 1.0}


def test_an_unknown_objective_is_named_with_what_exists():
    with pytest.raises(ValueError, match="objective 'match' is unknown; expected one of text"):
        objective_named("match")
