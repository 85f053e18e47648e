"""The lean T5 layers compute what transformers' own do, in fewer operations."""

from __future__ import annotations

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from mmcot.models.lean_t5 import make_lean
from mmcot.models.loss import token_loss_sum


def pair_of_models(**settings):
    """Two T5s with the same weights: transformers' own, and lean."""
    sizes = {"vocab_size": 90, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4}
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    torch.manual_seed(3)
    models = [T5ForConditionalGeneration(T5Config(**(sizes | tokens | {"dropout_rate": 0.0} | settings)))]
    models.append(T5ForConditionalGeneration(models[0].config))
    models[1].load_state_dict(models[0].state_dict())
    make_lean(models[1])
    return models


def block_of_rows(device="cpu"):
    """Sources of 11, 7 and 2 tokens, targets of 6, 3 and 5."""
    torch.manual_seed(4)
    mask = (torch.arange(11) < torch.tensor([[11], [7], [2]])).long()
    labels = torch.randint(2, 90, (3, 6)).masked_fill(torch.arange(6) >= torch.tensor([[6], [3], [5]]), -100)
    inputs = {"input_ids": torch.randint(2, 90, (3, 11)) * mask, "attention_mask": mask}
    inputs["decoder_input_ids"] = torch.randint(2, 90, (3, 6))
    return {name: tensor.to(device) for name, tensor in inputs.items()}, labels.to(device)


def loss_of(model, seed=0):
    inputs, labels = block_of_rows()
    torch.manual_seed(seed)
    return token_loss_sum(model(**inputs, use_cache=False).logits, labels)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize(
    "shape",
    [
        {"feed_forward_proj": "relu"},
        {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ],
)
def test_logits_losses_and_gradients_are_those_of_transformers(shape, dropout, checkpointing):
    models = pair_of_models(**shape, dropout_rate=dropout)
    for model in models:
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
    theirs, ours = (loss_of(model) for model in models)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    theirs.backward()
    ours.backward()
    for name, parameter in models[0].named_parameters():
        gradient = models[1].get_parameter(name).grad
        assert torch.allclose(gradient, parameter.grad, rtol=1e-4, atol=1e-5 * parameter.grad.abs().max()), name


def test_a_cache_attention_weights_and_hidden_states_are_those_of_transformers():
    theirs, ours = pair_of_models(feed_forward_proj="gated-gelu")
    inputs, _ = block_of_rows()
    source = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    for options in ({"num_beams": 1}, {"num_beams": 3}, {"use_cache": False}):
        texts = [model.eval().generate(**source, max_new_tokens=8, **options) for model in (theirs, ours)]
        assert torch.equal(*texts), options
    states = [model(**inputs, output_hidden_states=True).encoder_hidden_states for model in (theirs, ours)]
    assert len(states[1]) == 4
    for their_state, our_state in zip(*states, strict=True):
        torch.testing.assert_close(our_state, their_state, rtol=1e-5, atol=1e-5)


def test_in_bf16_the_logits_are_as_close_to_float64_as_those_of_transformers():
    theirs, ours = pair_of_models(feed_forward_proj="gated-gelu")
    inputs, _ = block_of_rows()
    exact = theirs.double()(**inputs, use_cache=False).logits
    found = [model.bfloat16()(**inputs, use_cache=False).logits.double() for model in (theirs, ours)]
    errors = [(logits - exact).abs().max().item() for logits in found]
    assert errors[1] < 1.5 * errors[0] + 1e-3


def test_names_and_types_of_a_checkpoint_stay():
    theirs, ours = pair_of_models()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert isinstance(ours.encoder, type(theirs.encoder)) and ours.can_generate()
