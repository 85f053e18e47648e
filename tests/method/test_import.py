"""Published relatives become models of ours: BLIP-2 with a T5 as a whole, IDEFICS' resampler beside a T5."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from launcher.cli.models import models_app
from launcher.config.loading import load_settings
from mmcot.errors import InputError
from mmcot.models.checkpoint_import import CheckpointError, import_checkpoint
from mmcot.models.opening import DEFAULT, check_start, open_model
from mmcot.texts.tokenizer import train_tokenizer
from mmcot.vision.encoders import VisionEncoder

IMAGE = 45  # BLIP-2's token of a picture
T5 = {"vocab_size": 300, "d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
HOSTS = {
    "Flan": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "v1.0": {"feed_forward_proj": "relu", "tie_word_embeddings": True},
}
QFORMER = {"hidden_size": 12, "num_attention_heads": 3, "num_hidden_layers": 3, "intermediate_size": 48}
VIT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "bridges" / "open_flamingo_resampler.safetensors")


class Runs:
    """An object whose unpickling would call a function."""

    def __reduce__(self):
        return (print, ("executed",))


def randomize(module):
    """Random values for every parameter, so that no difference hides behind a start with zeros or ones."""
    for name, parameter in module.named_parameters():
        is_scale = "norm" in name.lower() and name.endswith("weight")
        nn.init.normal_(parameter, mean=1.0 if is_scale else 0.0, std=0.3)


def save_blip2(folder, host="Flan", *, own_output_layer=True, qformer=None, **options):
    """A tiny random BLIP-2 in a folder, its configuration as the published ones."""
    torch.manual_seed(0)
    config = transformers.Blip2Config(
        vision_config={**VIT, "image_size": 28, "patch_size": 14},
        qformer_config=QFORMER | (qformer or {}),
        text_config=T5 | HOSTS[host] | {"model_type": "t5", "decoder_start_token_id": 0, "dropout_rate": 0.1},
        num_query_tokens=4,
        image_token_index=IMAGE,
    )
    model = transformers.Blip2ForConditionalGeneration(config)
    randomize(model)
    model.save_pretrained(folder, **options)
    if host == "Flan" and own_output_layer:
        weights = load_file(folder / "model.safetensors") | {"language_model.lm_head.weight": torch.randn(300, 24)}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    change_config(folder, lambda values: values["text_config"].update(HOSTS[host]))
    return folder


def change_config(folder, change):
    values = json.loads((folder / "config.json").read_text())
    change(values)
    (folder / "config.json").write_text(json.dumps(values))


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def logits_of_both(source, imported):
    """Logits of transformers' model and of the imported one, for the same pixels and texts of two lengths."""
    theirs = transformers.Blip2ForConditionalGeneration.from_pretrained(source).eval()
    ours, encoder = open_model(imported).eval(), VisionEncoder("blip2", source)
    torch.manual_seed(1)
    pixels, text, written = torch.randn(2, 3, 28, 28), torch.randint(50, 300, (2, 6)), torch.randint(50, 300, (2, 5))
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[1, 8:] = 0
    with torch.no_grad():
        expected = theirs(
            pixel_values=pixels,
            input_ids=torch.cat([torch.full((2, 4), IMAGE), text], dim=1),
            attention_mask=mask,
            decoder_input_ids=written,
        ).logits
        found = ours(
            input_ids=torch.cat([torch.zeros(2, 4, dtype=torch.long), text], dim=1),
            attention_mask=mask,
            vision_features=encoder._features(pixels),
            decoder_input_ids=written,
        ).logits
    assert expected.std() > 0.1 and not torch.allclose(expected[0], expected[1], atol=1e-2)
    return found, expected


@pytest.mark.parametrize("host", HOSTS)
def test_the_whole_model_is_that_of_blip_2(host, tmp_path):
    source = save_blip2(tmp_path / "blip2", host)
    done = import_checkpoint(source, tmp_path / "out")
    assert (done.vision_num_patches, done.vision_dim, done.tied) == (5, 16, host == "v1.0")
    found, expected = logits_of_both(source, tmp_path / "out")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # measured 1.9e-6, of values to 22


def test_a_flan_without_an_output_layer_of_its_own_computes_as_transformers_ties_it(tmp_path):
    source = save_blip2(tmp_path / "blip2", own_output_layer=False)
    import_checkpoint(source, tmp_path / "out")
    found, expected = logits_of_both(source, tmp_path / "out")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_picture_of_other_pixels_changes_what_the_imported_model_says(tmp_path):
    source = save_blip2(tmp_path / "blip2")
    import_checkpoint(source, tmp_path / "out")
    model = open_model(tmp_path / "out").eval()
    ids = torch.tensor([[0, 0, 0, 0, 60, 70]])
    features = torch.randn(2, 1, 5, 16)
    first, second = (
        model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            vision_features=each,
            decoder_input_ids=torch.tensor([[0, 9]]),
        ).logits
        for each in features
    )
    assert (first - second).abs().max() > 0.01


def test_weights_in_several_files_read_as_in_one(tmp_path):
    whole = save_blip2(tmp_path / "whole", own_output_layer=False)
    parts = save_blip2(tmp_path / "parts", own_output_layer=False, max_shard_size="20KB")
    assert not (parts / "model.safetensors").exists() and len(list(parts.glob("*.safetensors"))) > 2
    for source in (whole, parts):
        import_checkpoint(source, tmp_path / f"out-{source.name}")
    first, second = (load_file(tmp_path / f"out-{name}" / "model.safetensors") for name in ("whole", "parts"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_missing_part_of_the_weights_is_named(tmp_path):
    source = save_blip2(tmp_path / "blip2", own_output_layer=False, max_shard_size="20KB")
    lost = sorted(source.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(CheckpointError, match=rf"index\.json names the file '{lost.name}', which is not beside it"):
        import_checkpoint(source, tmp_path / "out")


def test_an_index_that_leads_out_of_the_folder_is_refused(tmp_path):
    source = save_blip2(tmp_path / "blip2", own_output_layer=False, max_shard_size="20KB")
    index = source / "model.safetensors.index.json"
    first = min(json.loads(index.read_text())["weight_map"].values())
    index.write_text(index.read_text().replace(first, f"../blip2/{first}"))
    with pytest.raises(CheckpointError, match="which is not beside it"):
        import_checkpoint(source, tmp_path / "out")


def test_weights_of_two_types_become_float32(tmp_path):
    source = save_blip2(tmp_path / "blip2")

    def halve(weights):
        weights.update({name: w.bfloat16() for name, w in weights.items() if name.startswith("language_model.")})

    change_weights(source, halve)
    import_checkpoint(source, tmp_path / "out")
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float32}


def test_an_opt_is_refused_as_a_causal_language_model(tmp_path):
    source = save_blip2(tmp_path / "blip2")
    change_config(source, lambda values: values["text_config"].update(model_type="opt"))
    with pytest.raises(CheckpointError, match="'opt', a causal one such as OPT, which is not supported yet"):
        import_checkpoint(source, tmp_path / "out")


def test_missing_and_unknown_tensors_of_blip_2_are_named_as_they_are_there(tmp_path):
    source = save_blip2(tmp_path / "blip2")

    def damage(weights):
        weights["qformer.extra"] = weights.pop("language_projection.bias")

    change_weights(source, damage)
    with pytest.raises(CheckpointError, match=r"missing language_projection\.bias; unexpected qformer\.extra"):
        import_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("qformer", "message"),
    [
        ({"intermediate_size": 24}, r"intermediate_size .* is 24, the Q-Former here has 48"),
        ({"cross_attention_frequency": 1}, "cross_attention_frequency .* is 1, the Q-Former here has 2"),
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps .* is 1e-05, the Q-Former here has 1e-12"),
        ({"hidden_act": "silu"}, "hidden_act .* is 'silu', the Q-Former here has 'gelu' or 'relu'"),
    ],
)
def test_another_qformer_than_the_published_one_is_refused_by_name(qformer, message, tmp_path):
    source = save_blip2(tmp_path / "blip2", qformer=qformer)
    with pytest.raises(CheckpointError, match=message):
        import_checkpoint(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "blip-2", "architectures": ["Blip2ForImageTextRetrieval"]}, "Blip2ForImageTextRetrieval"),
        ({"model_type": "llava"}, "but the kind 'llava'"),
        ({"model_type": "idefics2"}, "but the kind 'idefics2'"),
        ({"model_type": "t5"}, "but the kind 't5'"),
    ],
)
def test_other_classes_are_refused_by_name(config, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        import_checkpoint(tmp_path, tmp_path / "out")


def test_the_shape_of_features_is_not_asked_for_where_the_checkpoint_says_it(tmp_path):
    source = save_blip2(tmp_path / "blip2")
    with pytest.raises(CheckpointError, match="says the shape of its features; do not give it"):
        import_checkpoint(source, tmp_path / "out", vision_num_patches=7)
    with pytest.raises(CheckpointError, match="has its own language model"):
        import_checkpoint(source, tmp_path / "out", language_model="t5-small")


def test_the_command_prints_the_settings_that_fit_what_it_imported(tmp_path):
    source = save_blip2(tmp_path / "blip2")
    said = CliRunner().invoke(models_app, ["import-checkpoint", str(source), "--out", str(tmp_path / "out")])
    assert said.exit_code == 0, said.output
    printed = re.findall(r"--set (\S+)", said.output)
    settings = load_settings(preset="demo", overrides=printed)
    check_start(DEFAULT, settings.model.pretrained, **settings.model.fixed_by_start(16))
    assert settings.data.features == "blip2" and settings.data.vision_model == str(source)
    other = load_settings(preset="demo", overrides=[*printed, "model.resample_depth=2"])
    with pytest.raises(InputError, match="trained with resample_depth 3, the new model has 2"):
        check_start(DEFAULT, other.model.pretrained, **other.model.fixed_by_start(16))


# IDEFICS


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """A T5 with a tokenizer."""
    folder = tmp_path_factory.mktemp("t5")
    torch.manual_seed(2)
    tokenizer = train_tokenizer(["Question: Which is bigger? The sun."] * 4, folder, vocab_size=300)
    config = transformers.T5Config(**T5, decoder_start_token_id=0, pad_token_id=tokenizer.pad_token_id)
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def save_idefics(folder, *, use_resampler=True, qk_norm=True):
    torch.manual_seed(3)
    config = transformers.IdeficsConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        use_resampler=use_resampler,
        vision_config={
            "embed_dim": 20,
            "image_size": 28,
            "patch_size": 14,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 24,
        },
        perceiver_config={
            "use_resampler": True,
            "resampler_n_latents": 3,
            "resampler_depth": 2,
            "resampler_n_heads": 2,
            "resampler_head_dim": 7,
            "qk_layer_norms_perceiver": qk_norm,
        },
    )
    model = transformers.IdeficsForVisionText2Text(config).eval()
    randomize(model)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("qk_norm", [True, False])
def test_the_media_are_those_of_idefics_before_the_new_linear_layer(qk_norm, language_model, tmp_path):
    theirs = save_idefics(tmp_path / "idefics", qk_norm=qk_norm)
    done = import_checkpoint(tmp_path / "idefics", tmp_path / "out", language_model=str(language_model))
    bridge, features = open_model(tmp_path / "out").eval().encoder.fusion, torch.randn(2, 5, 20)
    assert (done.vision_num_patches, done.vision_dim) == (5, 20) and bridge.project.out_features == 24
    with torch.no_grad():
        expected = theirs.model.perceiver_resampler(features)
        torch.testing.assert_close(bridge.resampler(features[:, None])[:, 0], expected, rtol=1e-5, atol=1e-5)


def test_the_language_model_beside_the_resampler_keeps_its_weights(language_model, tmp_path):
    save_idefics(tmp_path / "idefics")
    import_checkpoint(tmp_path / "idefics", tmp_path / "out", language_model=str(language_model))
    plain = dict(transformers.T5ForConditionalGeneration.from_pretrained(language_model).named_parameters())
    ours = {name: p for name, p in open_model(tmp_path / "out").named_parameters() if "bridge" not in name}
    assert ours.keys() == plain.keys() and all(torch.equal(ours[name], plain[name]) for name in plain)
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_importing_twice_gives_the_same_new_layer_and_leaves_torchs_seed_alone(language_model, tmp_path):
    save_idefics(tmp_path / "idefics")
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    for name in ("a", "b"):
        import_checkpoint(tmp_path / "idefics", tmp_path / name, language_model=str(language_model))
    assert torch.equal(torch.rand(3), expected)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_idefics_without_a_resampler_or_a_t5_says_so(language_model, tmp_path):
    save_idefics(tmp_path / "idefics", use_resampler=False)
    with pytest.raises(CheckpointError, match="give a T5 to put it beside"):
        import_checkpoint(tmp_path / "idefics", tmp_path / "out")
    with pytest.raises(CheckpointError, match="use_resampler false"):
        import_checkpoint(tmp_path / "idefics", tmp_path / "out", language_model=str(language_model))


def test_a_resampler_that_lacks_a_tensor_is_refused_by_its_name_there(language_model, tmp_path):
    save_idefics(tmp_path / "idefics")
    change_weights(tmp_path / "idefics", lambda weights: weights.pop("model.perceiver_resampler.latents"))
    with pytest.raises(CheckpointError, match=r"missing model\.perceiver_resampler\.latents; unexpected nothing"):
        import_checkpoint(tmp_path / "idefics", tmp_path / "out", language_model=str(language_model))


def test_a_language_model_that_has_media_or_is_no_t5_is_refused(language_model, tmp_path):
    save_idefics(tmp_path / "idefics")
    import_checkpoint(tmp_path / "idefics", tmp_path / "out", language_model=str(language_model))
    with pytest.raises(InputError, match="has media already"):
        import_checkpoint(tmp_path / "idefics", tmp_path / "again", language_model=str(tmp_path / "out"))
    with pytest.raises(InputError, match=str(tmp_path / "idefics")):
        import_checkpoint(tmp_path / "idefics", tmp_path / "again", language_model=str(tmp_path / "idefics"))


# OpenFlamingo: its resampler of tests/golden/bridges, in a file as published.


def save_openflamingo(path, change=lambda weights: weights):
    weights = {
        f"perceiver.{name.removeprefix('weights.')}": tensor
        for name, tensor in GOLDEN.items()
        if name.startswith("weights.")
    }
    gated = {"lang_encoder.gated_cross_attn_layers.0.attn_gate": torch.zeros(1)}
    torch.save(change(weights | gated), path)
    return path


@pytest.mark.parametrize(
    "change",
    [
        lambda weights: weights,
        lambda weights: {"model_state_dict": {f"module.{name}": w for name, w in weights.items()}, "epoch": 1},
    ],
    ids=["published", "of a training"],
)
def test_the_media_are_those_of_openflamingo_before_the_new_linear_layer(change, language_model, tmp_path):
    source = save_openflamingo(tmp_path / "checkpoint.pt", change)
    done = import_checkpoint(source.parent, tmp_path / "out", language_model=str(language_model))
    assert (done.vision_num_patches, done.vision_dim, done.media["resample_heads"]) == (256, 4, 2)
    resampler = open_model(tmp_path / "out").eval().encoder.fusion.resampler
    with torch.no_grad():
        media = resampler(GOLDEN["inputs.x"][:, :, 0])
    torch.testing.assert_close(media, GOLDEN["outputs.media"], rtol=1e-5, atol=1e-5)


def test_embeddings_of_time_are_refused_by_name_and_so_is_a_file_without_a_resampler(language_model, tmp_path):
    def with_frames(weights):
        return weights | {"perceiver.frame_embs": torch.zeros(1, 4)}

    source = save_openflamingo(tmp_path / "a.pt", with_frames)
    with pytest.raises(CheckpointError, match="missing nothing; unexpected frame_embs; give OpenFlamingo's own file"):
        import_checkpoint(source, tmp_path / "out", language_model=str(language_model))
    source = save_openflamingo(tmp_path / "b.pt", lambda weights: {"lang_encoder.x": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"b\.pt lacks perceiver\.latents"):
        import_checkpoint(source, tmp_path / "out", language_model=str(language_model))


def test_a_checkpoint_of_openflamingo_that_would_run_code_is_not_opened(language_model, tmp_path):
    torch.save({"perceiver.latents": Runs()}, tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt holds Python objects, such as print, .*never loaded"):
        import_checkpoint(tmp_path, tmp_path / "out", language_model=str(language_model))
