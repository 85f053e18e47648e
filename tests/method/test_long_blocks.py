"""The loss of a long block, whose logits are never in memory together."""

from __future__ import annotations

import pytest
import torch

from mmcot.models import loss as losses
from mmcot.models.loss import objective_named
from mmcot.models.t5 import T5ForMultimodalGeneration
from mmcot.texts.encoding import IGNORED_LABEL

SHAPE = {"vocab_size": 50, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}


def new_model(is_tied):
    torch.manual_seed(0)
    vision = {"vision_num_patches": 3, "vision_dim": 8}
    shape = SHAPE | {"tie_word_embeddings": is_tied}
    return T5ForMultimodalGeneration.start(shape, vision, pad_token_id=0, eos_token_id=1).train()


def block():
    random = torch.Generator().manual_seed(1)
    ids, targets = (torch.randint(2, 50, (5, length), generator=random) for length in (11, 7))
    mask, labels = torch.ones_like(ids), targets.clone()
    mask[1, 4:], labels[2, 3:], labels[4] = 0, IGNORED_LABEL, IGNORED_LABEL
    inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": targets}
    return inputs | {"vision_features": torch.randn(5, 3, 8, generator=random)}, labels


def loss_and_gradients(model):
    inputs, labels = block()
    loss, unit = objective_named("text")(model, inputs, labels)["text"]
    loss.backward()
    assert unit == "tokens"
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("is_tied", [True, False])
def test_the_loss_and_gradients_of_a_long_block_are_those_of_all_logits_together(is_tied, monkeypatch):
    loss, gradients = loss_and_gradients(new_model(is_tied))
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 4 * 50)  # 4 of the 35 labels
    model, rows = new_model(is_tied), []
    model.lm_head.register_forward_hook(lambda module, given, logits: rows.append(logits.numel() // 50))
    found, found_gradients = loss_and_gradients(model)
    assert rows == [4] * 8 + [3, 3] + [4] * 8  # in the backward pass again, the last ones first
    torch.testing.assert_close(found, loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(found_gradients, gradients, rtol=1e-4, atol=1e-6)


def test_a_block_without_any_target_has_no_gradient_in_chunks_either(monkeypatch):
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 4 * 50)
    model, (inputs, labels) = new_model(True), block()
    loss = model(**inputs, use_cache=False, summed_labels=torch.full_like(labels, IGNORED_LABEL)).loss
    loss.backward()
    assert loss == 0 and all(parameter.grad.abs().max() == 0 for parameter in model.parameters())


def test_weights_that_ranks_gather_are_not_called_chunk_by_chunk(monkeypatch):
    # Under ZeRO-3 a rank with a long block would gather more often than one with a short block.
    loss, _ = loss_and_gradients(new_model(False))
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 4 * 50)
    model, rows = new_model(False), []
    model.lm_head.weight.ds_id = 7  # as ZeRO-3 marks a parameter
    model.lm_head.register_forward_hook(lambda module, given, logits: rows.append(logits.shape[:-1].numel()))
    found, _ = loss_and_gradients(model)
    assert rows == [35] and found == loss
