"""What is found before any work is done, and the presets for real backbones."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from launcher.config.chains import ANSWERS, CHAINS, Chain, Stage
from launcher.config.loading import load_settings
from launcher.config.settings import SettingsError
from launcher.pipeline.preflight import check_machine, check_settings
from launcher.pipeline.training_job import _check_pairs
from launcher.stages.hub import fetch_pretrained
from launcher.training.deepspeed_engine import _parameter_groups, deepspeed_config
from mmcot.models.t5 import MultimodalT5Config, T5ForMultimodalGeneration
from mmcot.vision.encoder_kinds import ENCODERS
from mmcot.vision.patches import patch_shape

PUBLISHED_PARAMETERS = {"scienceqa-base": 251_907_840, "scienceqa-large": 790_496_256}
XL_PARAMETERS = 2_877_032_448  # nobody has published it; num_parameters_by_hand gives it, and the published two
# google/flan-t5-xl's config.json, as far as it says anything about the model
FLAN_T5_XL = {
    "architectures": ["T5ForConditionalGeneration"],
    "model_type": "t5",
    "is_encoder_decoder": True,
    "vocab_size": 32128,
    "d_model": 2048,
    "d_kv": 64,
    "d_ff": 5120,
    "num_layers": 24,
    "num_decoder_layers": 24,
    "num_heads": 32,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "dropout_rate": 0.1,
    "layer_norm_epsilon": 1e-06,
    "initializer_factor": 1.0,
    "n_positions": 512,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
    "use_cache": True,
}


def num_parameters_by_hand(shape, *, vision_dim):
    """Parameters of an untied gated T5 with fusion, from its shape alone; T5's own parts have no biases."""
    d, inner = shape.d_model, shape.num_heads * shape.d_kv
    attention = 4 * d * inner  # queries, keys, values, output
    feed_forward = 3 * d * shape.d_ff  # gate, up, down
    encoder_layer = attention + feed_forward + 2 * d  # a norm before each part
    decoder_layer = 2 * attention + feed_forward + 3 * d  # also looks at the encoder
    stack_ends = 2 * (d + 32 * shape.num_heads)  # of either stack: the last norm, and 32 buckets of relative positions
    embeddings = 2 * shape.vocab_size * d  # shared by both stacks, and an lm_head of its own
    fusion = (
        (vision_dim * d + d) + (4 * d * d + 4 * d) + (2 * d * d + d)
    )  # image_dense, mha_layer, gate_dense, with biases
    return embeddings + shape.num_layers * (encoder_layer + decoder_layer) + stack_ends + fusion


@pytest.mark.parametrize("preset", ["demo", "single-gpu", "scienceqa-base", "scienceqa-large", "scienceqa-xl"])
def test_the_model_of_every_preset_builds_on_the_meta_device(preset):
    settings = load_settings(preset=preset)
    num_patches, dim = ENCODERS[settings.data.features].published_shape or patch_shape()
    shape = settings.model.shape.for_config
    shape["vocab_size"] = shape["vocab_size"] or 1000
    with torch.device("meta"):
        config = MultimodalT5Config(vision_num_patches=num_patches, vision_dim=dim, decoder_start_token_id=0, **shape)
        model = T5ForMultimodalGeneration(config)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    known = PUBLISHED_PARAMETERS | {"scienceqa-xl": XL_PARAMETERS}
    assert num_parameters == known.get(preset, num_parameters) and num_parameters > 100_000
    if preset in known:
        assert num_parameters == num_parameters_by_hand(settings.model.shape, vision_dim=dim)


def test_flan_t5_xl_with_fusion_builds_from_its_own_configuration_and_the_preset_says_the_same_shape(tmp_path):
    settings = load_settings(preset="scienceqa-xl", overrides=[f"model.pretrained={tmp_path}"])
    (tmp_path / "config.json").write_text(json.dumps(FLAN_T5_XL))
    fetch_pretrained(settings.model.pretrained)
    num_patches, dim = ENCODERS["vit"].published_shape
    config = MultimodalT5Config.from_pretrained(tmp_path, vision_num_patches=num_patches, vision_dim=dim)
    with torch.device("meta"):
        model = T5ForMultimodalGeneration(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == XL_PARAMETERS
    shape = settings.model.shape.for_config  # of random weights alone
    assert {name: FLAN_T5_XL[name] for name in shape} == shape
    assert not config.is_tied and model.lm_head.weight is not model.shared.weight


def test_the_xl_preset_fits_cards_of_24_gb_by_the_arithmetic_that_its_comments_tell():
    settings = load_settings(preset="scienceqa-xl")
    training, shape, world_size = settings.training, settings.model.shape, settings.cluster.num_workers
    config = deepspeed_config(training, world_size=world_size)
    assert (
        config["zero_optimization"]["stage"],
        config["bf16"]["enabled"],
        training.activation_checkpointing,
        world_size,
    ) == (3, True, True, 8)
    assert training.global_batch_size // training.micro_batch_size == 2 * world_size  # no rank computes a dummy block
    # bf16 weights and gradients, fp32 weights, two moments. ZeRO-2 would keep the first whole, a checkpoint contains
    # the last three.
    weights, gradients, optimizer = 2 * XL_PARAMETERS, 2 * XL_PARAMETERS, 12 * XL_PARAMETERS
    states = (weights + gradients + optimizer) / world_size
    assert states / 1e9 == pytest.approx(5.8, abs=0.05) and optimizer / 1e9 == pytest.approx(34.5, abs=0.05)
    assert (weights + (gradients + optimizer) / world_size) / 1e9 == pytest.approx(10.8, abs=0.05)
    # The encoder's and the decoder's layers keep their input, of bf16 states. Logits exist in bf16, in fp32 and as a
    # gradient.
    tokens = training.micro_batch_size * settings.rationale.max_source_tokens  # the target may be as long
    kept = 2 * shape.num_layers * tokens * shape.d_model * 2
    logits = tokens * shape.vocab_size * (2 + 4 + 4)
    assert (
        states + kept + logits
    ) / 1e9 < 24 / 2  # the other half: a layer computed again, DeepSpeed's buckets, what is fragmented
    # generation: keys and values of each decoder layer, of source and target, in bf16, beside a whole replica
    row = (
        2
        * shape.num_layers
        * shape.num_heads
        * shape.d_kv
        * (settings.rationale.max_source_tokens + settings.rationale.max_target_tokens)
        * 2
    )
    assert settings.generation.precision == "bf16" and row / 1e9 == pytest.approx(0.2, abs=0.005)
    assert (weights + settings.generation.batch_size * row) / 1e9 < 24 / 2 + 1


def test_the_xl_preset_on_four_gpus_is_refused_before_its_weights_are_fetched(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(SettingsError, match=r"cluster.num_workers \(8\) needs a GPU each, this machine has 4"):
        check_machine(load_settings(preset="scienceqa-xl"))


def test_features_that_cannot_be_made_stop_the_run_before_any_work_and_say_how_to_supply_them(tmp_path):
    settings = load_settings(preset="scienceqa-base", overrides=[f"data.path={tmp_path}", "data.features=dino"])
    with pytest.raises(
        SettingsError,
        match=r"'dino' cannot be made on this machine .* set data.shards_dir to a folder that holds features/dino",
    ):
        check_settings(settings)
    settings = load_settings(
        preset="scienceqa-base",
        overrides=[f"data.path={tmp_path}", f"data.shards_dir={tmp_path}", "data.features=dino"],
    )
    with pytest.raises(SettingsError, match=r"features/dino is missing"):
        check_settings(settings)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.path=nowhere", "data.path nowhere does not exist"),
        ("rationale.format=QCM-X", "rationale.format: .*QCM-X.*did you mean"),
    ],
)
def test_a_setting_that_cannot_be_is_named_before_the_start(override, message):
    with pytest.raises(SettingsError, match=message):
        check_settings(load_settings(preset="demo", overrides=[override]))


def test_a_chain_whose_stages_have_other_names_passes_with_every_preset(monkeypatch):
    chain = Chain("other", "QCM→A", (Stage("solve", "QCM-A", writes=ANSWERS),))
    monkeypatch.setitem(CHAINS, "other", chain)
    settings = load_settings(preset="demo", overrides=["run.chain=other", "stages.solve.num_steps=1"])
    assert settings.stage("solve").format == "QCM-A"
    check_settings(settings)


MATCHES = ["run.chain=match-first", "stages.match.num_steps=1", "answer.max_target_tokens=96"]
QFORMER = ["model.inject=embed", "model.resample=qformer"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "trains a Q-Former, and model.inject is encoder with model.resample none; set model.inject=embed"),
        (
            [*QFORMER, "stages.match.trains=all"],
            "bridge alone, and stages.match.trains is all; leave it out",
        ),
        (["model.inject=embed", "model.resample=perceiver"], "model.resample perceiver; set model.inject=embed and"),
        ([*QFORMER, "data.max_pictures=2"], "matches one picture with a text, and data.max_pictures is 2"),
        ([*QFORMER, "training.max_tokens_per_block=4096"], "training.max_tokens_per_block is 4,096; leave it out"),
        ([*QFORMER, "stages.match.micro_batch_size=1"], "training.micro_batch_size is 1; give at least 2"),
    ],
)
def test_what_a_stage_that_matches_cannot_use_is_named_before_the_start(overrides, message):
    settings = load_settings(preset="demo", overrides=[*MATCHES, *overrides])
    with pytest.raises(SettingsError, match=f"run.chain match-first, stage 'match' .*{message}"):
        check_settings(settings)


def test_a_stage_that_matches_without_features_is_refused():
    with pytest.raises(SettingsError, match=r"nothing to train without data\.features"):
        load_settings(preset="demo", overrides=[*MATCHES, *QFORMER, "data.features=null"])
    check_settings(load_settings(preset="demo", overrides=[*MATCHES, *QFORMER, "answer.trains=all"]))


def test_a_split_without_a_text_or_a_picture_to_match_is_refused_and_rows_that_lack_one_are_counted():
    counts = {"train": {"num_with_features": 2}, "val": {"num_with_features": 0}}
    lines, folder = [], SimpleNamespace(features={"counts": counts})
    _check_pairs(np.array([5, 1, 4]), folder, "train", "stage 'match'", lines.append)
    ending = "and no part in the matching"
    assert lines == [f"1 of 3 samples of train have no {what} {ending}" for what in ("text", "picture")]
    with pytest.raises(SettingsError, match=r"no sample of train has a text; give the captions .*data\.captions"):
        _check_pairs(np.array([1, 1]), folder, "train", "stage 'match'", lines.append)
    with pytest.raises(SettingsError, match="no sample of val has a picture"):
        _check_pairs(np.array([5]), folder, "val", "stage 'match'", lines.append)


def test_a_bridge_beside_a_random_language_model_that_no_stage_trains_is_refused():
    overrides = [*MATCHES, *QFORMER]
    with pytest.raises(SettingsError, match="stage 'answer' trains bridge and freezes a language model of random"):
        check_settings(load_settings(preset="demo", overrides=overrides))
    check_settings(load_settings(preset="demo", overrides=[*overrides, "answer.trains=all"]))


def test_an_unknown_objective_is_named_with_its_stage_before_the_start(monkeypatch):
    chain = Chain("other", "QCM→A", (Stage("solve", "QCM-A", objective="contrast", writes=ANSWERS),))
    monkeypatch.setitem(CHAINS, "other", chain)
    settings = load_settings(preset="demo", overrides=["run.chain=other", "stages.solve.num_steps=1"])
    with pytest.raises(SettingsError, match="stage 'solve': objective 'contrast' is unknown; expected one of text"):
        check_settings(settings)


def test_a_gpu_that_is_not_there_is_never_replaced_by_the_processor(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SettingsError, match=r"needs a GPU each, this machine has 0"):
        check_machine(load_settings(preset="single-gpu"))


def test_a_full_disk_is_found_before_the_start(tmp_path, monkeypatch):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**12, 10**12, 5_000_000))
    with pytest.raises(SettingsError, match=r"has 0.01 GB left"):
        check_machine(load_settings(preset="demo", overrides=[f"run.dir={tmp_path / 'a'}"]))


def test_a_model_that_cannot_be_fetched_is_named_with_where_to_put_it(tmp_path):
    with pytest.raises(
        SettingsError, match=r"'nobody/no-such-model' is no local folder .* Put its files into a folder"
    ):
        fetch_pretrained("nobody/no-such-model")
    with pytest.raises(SettingsError, match="has no config.json"):
        fetch_pretrained(str(tmp_path))


@pytest.fixture
def small_model():
    config = MultimodalT5Config(
        vocab_size=20,
        d_model=8,
        d_kv=4,
        d_ff=8,
        num_layers=1,
        num_heads=2,
        vision_num_patches=2,
        vision_dim=3,
        decoder_start_token_id=0,
    )
    return T5ForMultimodalGeneration(config)


def test_the_fusion_layers_may_have_a_learning_rate_of_their_own(small_model):
    training = load_settings(
        preset="demo", overrides=["training.learning_rate=1e-4", "training.fusion_learning_rate=5e-4"]
    ).training
    groups = _parameter_groups(small_model, training)
    fusion = {
        id(p)
        for name, p in small_model.named_parameters()
        if "image_dense" in name or "mha_layer" in name or "gate_dense" in name
    }
    for group in groups:
        assert {id(p) in fusion for p in group["params"]} == {group["lr_ratio"] == pytest.approx(5.0)}
        assert {p.dim() > 1 for p in group["params"]} == {group["weight_decay"] > 0}
    assert sum(len(group["params"]) for group in groups) == len(list(small_model.parameters()))


def test_a_frozen_backbone_leaves_the_fusion_alone_to_train(small_model):
    training = load_settings(preset="demo", overrides=["training.freeze_backbone=true"]).training
    trained = [p for group in _parameter_groups(small_model, training) for p in group["params"]]
    assert len(trained) == 8 and sum(p.requires_grad for p in small_model.parameters()) == 8
    with pytest.raises(SettingsError, match="leaves nothing to train"):
        load_settings(preset="demo", overrides=["training.freeze_backbone=true", "data.features=null"])


def test_a_token_budget_that_texts_not_written_yet_may_exceed_is_refused_before_any_work():
    settings = load_settings(preset="demo", overrides=["training.max_tokens_per_block=271"])
    with pytest.raises(
        SettingsError,
        match=r"max_tokens_per_block \(271\) is below the longest question that stage 'answer' may read with texts "
        r"that are not written yet, 272 tokens \(answer\.max_source_tokens 256, max_target_tokens 16\); give at "
        r"least 272",
    ):
        check_settings(settings)
    check_settings(load_settings(preset="demo", overrides=["training.max_tokens_per_block=272"]))
