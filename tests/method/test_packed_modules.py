"""A copy of a module tree applies packed weights, and shares everything else with the modules it was made of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, T5Config, T5EncoderModel
from transformers.pytorch_utils import Conv1D

from mmcot.models.packed_modules import packed


def make(kind):
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 61, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    if kind == "llama":
        config = LlamaConfig(**sizes, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
        return LlamaForCausalLM(config).eval()
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(**sizes, n_embd=32, n_layer=2, n_head=4)).eval()
    return T5EncoderModel(T5Config(**sizes, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)).eval()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_a_packed_model_computes_what_the_model_computes_and_shares_its_parameters(kind):
    model, ids = make(kind), torch.randint(0, 61, (3, 7))
    before = {name: type(module) for name, module in model.named_modules()}
    copied = packed(model)
    with torch.inference_mode():
        expected, ours = model(ids)[0], copied(ids)[0]
    assert (ours - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert type(copied) is type(model) and {name: type(module) for name, module in model.named_modules()} == before
    theirs = dict(model.named_parameters()) | dict(model.named_buffers())
    own = dict(copied.named_parameters()) | dict(copied.named_buffers())
    assert own.keys() == theirs.keys() and all(own[name] is theirs[name] for name in theirs)
    linears = [module for module in model.modules() if type(module) in (nn.Linear, Conv1D)]
    assert linears and not [module for module in copied.modules() if type(module) in (nn.Linear, Conv1D)]


@pytest.mark.parametrize("layer", [nn.Linear(40, 24), nn.Linear(1408, 512, bias=False), Conv1D(24, 40)])
def test_a_row_of_a_packed_layer_is_the_same_whatever_rows_stand_beside_it(layer):
    apply, width = packed(layer), max(layer.weight.shape) if isinstance(layer, nn.Linear) else 40
    states_BD = torch.randn(70, width)
    with torch.inference_mode():
        together = apply(states_BD)
        for start, stop in ((0, 1), (7, 8), (3, 5), (20, 53), (69, 70)):
            assert torch.equal(apply(states_BD[start:stop]), together[start:stop])
            assert torch.equal(apply(states_BD[start:stop, None]), together[start:stop, None])


def test_a_module_that_stands_at_several_places_is_one_module_in_the_copy_too():
    shared = nn.Linear(4, 4)
    copied = packed(nn.Sequential(shared, nn.ReLU(), shared))
    assert copied[0] is copied[2] and copied[0] is not shared


def test_what_is_put_on_the_copy_is_not_on_the_model():
    model = nn.Sequential(nn.Linear(4, 4))
    copied = packed(model)
    copied.register_buffer("own", torch.zeros(1))
    copied[0] = nn.Identity()
    assert not hasattr(model, "own") and type(model[0]) is nn.Linear


def test_gradients_flow_through_the_copy_to_the_shared_parameters():
    model = nn.Linear(4, 3)
    packed(model)(torch.ones(2, 4)).sum().backward()
    assert model.weight.grad is not None and torch.equal(model.weight.grad, torch.full((3, 4), 2.0))


def test_a_module_of_another_device_stays_itself():
    model = nn.Linear(4, 3, device="meta")
    assert packed(model) is model
