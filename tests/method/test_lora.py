"""LoRA: adapters in place, merged for the export, alone in peft's own form; and the choice of what is trained."""

from __future__ import annotations

import builtins
import copy

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import T5Config, T5ForConditionalGeneration

from mmcot.errors import InputError, MissingPackageError
from mmcot.models.lora import add_adapters, merged_state, save_adapters
from mmcot.models.t5 import T5ForMultimodalGeneration
from mmcot.models.trained_parts import choose_trained, count_parameters

SHAPE = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 60}
VISION = {"vision_num_patches": 5, "vision_dim": 6}
LORA = {"rank": 3, "alpha": 6.0, "dropout": 0.0, "targets": ["q", "v"], "seed": 5}
NUM_TARGETS = 2 * (2 + 2 * 2)  # q and v in two layers of the encoder, and of the decoder twice


@pytest.fixture
def base(tmp_path):
    """The folder of a text model with random weights, as transformers saves it."""
    torch.manual_seed(0)
    T5ForConditionalGeneration(T5Config(**SHAPE, decoder_start_token_id=0)).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def model(base):
    torch.manual_seed(1)
    return T5ForMultimodalGeneration.from_pretrained(base, **VISION).eval()


def block(**more):
    ids = torch.tensor([[5, 9, 3, 1], [7, 2, 1, 0]])
    return {
        "input_ids": ids,
        "attention_mask": (ids > 0).long(),
        "decoder_input_ids": torch.tensor([[0, 4], [0, 8]]),
        **more,
    }


def pictures():
    return {"vision_features": torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(2))}


def trained_adapters(model, **changes):
    """The model with adapters as after a training: no matrix B is zero any more."""
    add_adapters(model, **LORA | changes)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(std=0.1, generator=generator)
    return model


@torch.no_grad()
def test_a_model_with_new_adapters_computes_exactly_what_it_computed_before(model):
    expected = model(**block(**pictures())).logits
    add_adapters(model, **LORA)
    assert type(model) is T5ForMultimodalGeneration
    assert torch.equal(model(**block(**pictures())).logits, expected)


def test_adapters_start_by_their_seed_alone_whatever_was_drawn_before(model):
    other = copy.deepcopy(model)
    add_adapters(model, **LORA)
    torch.manual_seed(99)
    add_adapters(other, **LORA)
    pairs = zip(model.named_parameters(), other.named_parameters(), strict=True)
    assert all(name == name_2 and torch.equal(first, second) for (name, first), (name_2, second) in pairs)
    starts = [value for name, value in model.named_parameters() if ".lora_A." in name]
    assert len(starts) == NUM_TARGETS and all(value.any() for value in starts)


@torch.no_grad()
@pytest.mark.parametrize("targets", [["q", "v"], ["k", "o", "wi", "wo", "q", "v"], ["SelfAttention.q"]])
def test_merged_weights_compute_what_the_adapted_ones_compute(model, targets):
    plain = copy.deepcopy(model)
    before = plain(**block(**pictures())).logits
    trained_adapters(model, targets=targets)
    expected = model(**block(**pictures())).logits
    plain.load_state_dict(merged_state(model, model.state_dict()))
    found = plain(**block(**pictures())).logits
    assert (found - expected).abs().max() <= 1e-5 < 1e-3 < (expected - before).abs().max()


@torch.no_grad()
def test_merging_changes_the_adapted_layers_alone_and_not_the_state_that_it_is_given(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained_adapters(model)
    state = model.state_dict()
    merged = merged_state(model, state)
    assert merged.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], merged[name])}
    assert len(changed) == NUM_TARGETS and {name.split(".")[-2] for name in changed} == {"q", "v"}
    assert all(torch.equal(before[name], state.get(name, state.get(_adapted(name)))) for name in before)


def _adapted(name):
    return name.replace(".weight", ".base_layer.weight")


@torch.no_grad()
@pytest.mark.parametrize("targets", [["q", "v"], ["k", "o", "q", "v"]])  # of 20 layers or more peft keeps ends of names
def test_peft_opens_the_adapters_on_the_text_model_that_they_were_trained_on(base, model, tmp_path, targets):
    trained_adapters(model, targets=targets)
    save_adapters(model, model.state_dict(), tmp_path / "adapters")
    assert sorted(path.name for path in (tmp_path / "adapters").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    text = T5ForConditionalGeneration.from_pretrained(base).eval()
    before = text(**block()).logits
    opened = peft.PeftModel.from_pretrained(text, tmp_path / "adapters").eval()
    expected = model(**block()).logits  # without a picture it is a text model
    assert (opened(**block()).logits - expected).abs().max() <= 1e-5 < 1e-3 < (expected - before).abs().max()


def test_saved_adapters_are_the_same_bytes_every_time_and_name_no_folder(model, tmp_path):
    trained_adapters(model)
    for name in ("first", "second"):
        save_adapters(model, model.state_dict(), tmp_path / name)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
    config = peft.LoraConfig.from_pretrained(tmp_path / "first")
    assert (config.r, config.lora_alpha, config.base_model_name_or_path) == (3, 6.0, None)
    assert len(load_file(tmp_path / "first" / "adapter_model.safetensors")) == 2 * NUM_TARGETS


def test_a_target_that_is_no_layer_of_the_language_model_is_refused_with_those_that_are(model):
    with pytest.raises(InputError, match=r"LoRA target 'gate_dense' is no linear layer .* it has k, o, q, v, wi, wo$"):
        add_adapters(model, **LORA | {"targets": ["q", "gate_dense"]})


def test_a_missing_peft_is_named_with_the_extra_that_brings_it(model, monkeypatch):
    load = builtins.__import__

    def without_peft(name, *arguments, **options):
        if name == "peft":
            raise ImportError("No module named 'peft'")
        return load(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_peft)
    with pytest.raises(MissingPackageError, match=r"pip install 'mmcot\[lora\]'"):
        add_adapters(model, **LORA)


def names_of_trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_the_bridge_alone_is_trained_or_the_bridge_and_the_adapters(model):
    choose_trained(model, "bridge")
    bridge = names_of_trained(model)
    assert bridge == {name for name, _ in model.named_parameters() if name.startswith(model.new_parts)} != set()
    add_adapters(model, **LORA)
    choose_trained(model, "lora")
    adapters = names_of_trained(model) - bridge
    assert bridge < names_of_trained(model) and len(adapters) == 2 * NUM_TARGETS
    assert all(".lora_A." in name or ".lora_B." in name for name in adapters)


def test_names_are_beginnings_of_parameter_names_up_to_a_dot(model):
    choose_trained(model, ["decoder.block.1", "encoder.gate_dense.bias"])
    found = names_of_trained(model)
    assert "encoder.gate_dense.bias" in found and "decoder.block.1.layer.0.SelfAttention.q.weight" in found
    assert all(name.startswith(("decoder.block.1.", "encoder.gate_dense.bias")) for name in found)
    choose_trained(model, "all")
    assert names_of_trained(model) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("decoder.block.9", r"'decoder\.block\.9' fits no parameter of this model; did you mean decoder\.block\.1, "),
        ("encoder.gate_dens", r"did you mean encoder\.gate_dense"),
        ("loar", "did you mean lora"),
        ("xyz", r"did you mean decoder, encoder, shared\?"),
    ],
)
def test_a_name_that_fits_no_parameter_is_refused_with_the_nearest_ones(model, name, message):
    with pytest.raises(InputError, match=message):
        choose_trained(model, ["encoder", name])


def test_parameters_are_counted_by_what_is_trained(model):
    total = sum(parameter.numel() for parameter in model.parameters())
    add_adapters(model, **LORA)
    choose_trained(model, "lora")
    counts = count_parameters(model)
    adapters = NUM_TARGETS * 3 * (32 + 32)
    bridge = sum(value.numel() for name, value in model.named_parameters() if name.startswith(model.new_parts))
    assert (counts.total, counts.trained, counts.adapters) == (total + adapters, bridge + adapters, adapters)
    assert counts.frozen == total - bridge
