"""Parity with the published model, and reading its checkpoints.

``golden/mmcot_relu_tied`` was made with the unmodified model of amazon-science/mm-cot
(torch 2.13 on a CPU, fp32, one thread, transformers 4.30) on a tiny T5 v1.0: relu, tied
embeddings, 2 + 2 layers of width 64, features 7 x 12. Rows 2 and 4 have no image (zeros).
"""

import json
import pathlib
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5ForConditionalGeneration

from mmcot.models.checkpoint_import import CheckpointError, import_checkpoint
from mmcot.models.t5 import MultimodalT5Config, T5ForMultimodalGeneration

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "mmcot_relu_tied"
INPUTS = load_file(GOLDEN / "inputs.safetensors")
OUTPUTS = load_file(GOLDEN / "outputs.safetensors")
TEXT = {"input_ids": INPUTS["input_ids"], "attention_mask": INPUTS["attention_mask"]}
TEXT_AND_IMAGE = TEXT | {"vision_features": INPUTS["image_ids"]}
FUSION_PARTS = ("image_dense", "mha_layer", "gate_dense")

TINY = {
    "vocab_size": 50,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 24,
    "num_layers": 1,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
    "vision_num_patches": 3,
    "vision_dim": 5,
}
KINDS = {
    "tied": TINY | {"feed_forward_proj": "relu", "tie_word_embeddings": True},
    "untied": TINY | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}


def copy_golden(folder, *, change_weights=None, change_config=None, file_name="model.safetensors"):
    """Write the golden checkpoint as a published folder, with its tensors or settings changed."""
    folder.mkdir()
    weights, settings = load_file(GOLDEN / "model.safetensors"), json.loads((GOLDEN / "config.json").read_text())
    weights = change_weights(weights) if change_weights else weights
    settings = change_config(settings) if change_config else settings
    (folder / "config.json").write_text(json.dumps(settings))
    if file_name.endswith(".bin"):
        torch.save(weights, folder / file_name)
    else:
        save_file(weights, folder / file_name)
    return folder


def without(*names):
    return lambda values: {name: value for name, value in values.items() if name not in names}


def random_model(kind, folder):
    """A tiny model whose every parameter matters, opened from a folder as users do."""
    torch.manual_seed(0)
    weights = {
        name: torch.randn_like(parameter) * 0.3
        for name, parameter in T5ForMultimodalGeneration(MultimodalT5Config(**KINDS[kind])).named_parameters()
    }
    MultimodalT5Config(**KINDS[kind]).save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model = T5ForMultimodalGeneration.from_pretrained(folder).eval()
    return model, weights


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imported")
    import_checkpoint(GOLDEN, folder)
    return folder


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def model(imported, request):
    return T5ForMultimodalGeneration.from_pretrained(imported, attn_implementation=request.param).eval()


@torch.no_grad()
def test_encoder_states_equal_the_published_ones_before_and_after_fusion(model):
    text = model.encoder(**TEXT).last_hidden_state
    fused = model.encoder(**TEXT_AND_IMAGE).last_hidden_state
    torch.testing.assert_close(text, OUTPUTS["encoder_text"], atol=1e-5, rtol=0)
    torch.testing.assert_close(fused, OUTPUTS["encoder_fused"], atol=1e-5, rtol=0)


@torch.no_grad()
def test_logits_and_loss_equal_the_published_ones(model):
    outputs = model(**TEXT_AND_IMAGE, labels=INPUTS["labels_masked"])
    torch.testing.assert_close(outputs.logits, OUTPUTS["logits"], atol=1e-5, rtol=0)
    assert outputs.loss.item() == pytest.approx(OUTPUTS["loss_masked"].item(), abs=1e-5)


@torch.no_grad()
def test_loss_with_padding_trained_on_equals_the_published_one(model):
    loss = model(**TEXT_AND_IMAGE, labels=INPUTS["labels_pad0"]).loss
    assert loss.item() == pytest.approx(OUTPUTS["loss_pad0"].item(), abs=1e-5)


def test_greedy_and_beam_search_write_the_published_tokens(model):
    greedy = model.generate(**TEXT_AND_IMAGE, max_length=24, num_beams=1, do_sample=False)
    beams = model.generate(**TEXT_AND_IMAGE, max_length=24, num_beams=4, early_stopping=True, do_sample=False)
    assert torch.equal(greedy, OUTPUTS["greedy_ids"])
    assert torch.equal(beams, OUTPUTS["beam4_ids"])


# Euclidean norms of the published model's gradients of loss_masked and loss_pad0.
GRADIENT_NORMS = {
    "shared.weight": (0.31924867630004883, 0.508853018283844),
    "encoder.image_dense.weight": (0.3171174228191376, 0.4047512114048004),
    "encoder.image_dense.bias": (0.19776803255081177, 0.3353680372238159),
    "encoder.mha_layer.in_proj_weight": (0.4193389117717743, 0.628402829170227),
    "encoder.mha_layer.in_proj_bias": (0.1386193037033081, 0.2935945689678192),
    "encoder.mha_layer.out_proj.weight": (0.4367402195930481, 0.5859001874923706),
    "encoder.gate_dense.weight": (0.4517914056777954, 0.5153272747993469),
    "encoder.gate_dense.bias": (0.05882929265499115, 0.06623151153326035),
}


@pytest.mark.parametrize(("labels", "column"), [("labels_masked", 0), ("labels_pad0", 1)])
def test_gradients_have_the_published_norms(model, labels, column):
    model.zero_grad()
    model(**TEXT_AND_IMAGE, labels=INPUTS[labels]).loss.backward()
    for name, norms in GRADIENT_NORMS.items():
        assert model.get_parameter(name).grad.norm().item() == pytest.approx(norms[column], rel=1e-5), name


def test_import_reports_what_it_wrote(tmp_path):
    report = import_checkpoint(GOLDEN, tmp_path / "out")
    expected = json.loads((GOLDEN / "expected.json").read_text())
    assert report.num_parameters == expected["param_count"]
    assert (report.vision_num_patches, report.vision_dim, report.tied, report.copied_files) == (7, 12, True, ())


def test_first_release_layout_and_pickle_file_read_the_same(tmp_path, imported):
    def first_release(weights):
        def bare(name):
            return name.removeprefix("encoder.") if name.split(".")[1] in FUSION_PARTS else name

        return {bare(name): tensor for name, tensor in weights.items()}

    source = copy_golden(tmp_path / "old", change_weights=first_release, file_name="pytorch_model.bin")
    import_checkpoint(source, tmp_path / "out")
    ours, theirs = load_file(tmp_path / "out" / "model.safetensors"), load_file(imported / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_untied_checkpoint_keeps_its_output_layer_apart(tmp_path):
    _model, weights = random_model("untied", tmp_path)
    report = import_checkpoint(tmp_path, tmp_path / "out")
    opened = T5ForMultimodalGeneration.from_pretrained(tmp_path / "out")
    assert not report.tied
    assert torch.equal(opened.lm_head.weight, weights["lm_head.weight"])
    assert torch.equal(opened.encoder.embed_tokens.weight, weights["shared.weight"])
    assert torch.equal(opened.decoder.embed_tokens.weight, weights["shared.weight"])


def test_old_settings_in_the_configuration_do_no_harm(tmp_path):
    old = {
        "architectures": ["T5ForMultimodalGeneration"],
        "model_type": "t5",
        "n_positions": 512,
        "output_past": True,
        "torch_dtype": "float32",
        "transformers_version": "4.21.1",
        "_name_or_path": "allenai/unifiedqa-t5-base",
        "task_specific_params": {"summarization": {"max_length": 200, "num_beams": 4, "prefix": "summarize: "}},
    }
    source = copy_golden(tmp_path / "old", change_config=lambda settings: settings | old)
    import_checkpoint(source, tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "patch_size" not in settings and settings["tie_word_embeddings"] is True


def test_tokenizer_and_generation_files_are_copied_along(tmp_path):
    source = copy_golden(tmp_path / "published")
    for name in ("spiece.model", "tokenizer_config.json", "generation_config.json", "optimizer.pt"):
        (source / name).write_text("{}")
    report = import_checkpoint(source, tmp_path / "out")
    assert report.copied_files == ("tokenizer_config.json", "spiece.model", "generation_config.json")
    assert (tmp_path / "out" / "spiece.model").exists() and not (tmp_path / "out" / "optimizer.pt").exists()


def test_number_of_patches_is_asked_for_where_nothing_tells_it(tmp_path):
    source = copy_golden(tmp_path / "published", change_config=without("patch_size"))
    with pytest.raises(CheckpointError, match="pass vision_num_patches"):
        import_checkpoint(source, tmp_path / "out")
    report = import_checkpoint(source, tmp_path / "out", vision_num_patches=7)
    assert (report.vision_num_patches, report.vision_dim) == (7, 12)


@pytest.mark.parametrize("where", ["keyword", "config.json"])
def test_features_of_another_width_are_named_with_both_sizes(tmp_path, where):
    source = copy_golden(tmp_path / "published", change_config=lambda settings: settings | {"patch_size": [100, 256]})
    given = {"vision_dim": 256} if where == "keyword" else {}
    with pytest.raises(CheckpointError, match=r"vision_dim is 256, but .* features of width 12"):
        import_checkpoint(GOLDEN if given else source, tmp_path / "out", **given)


def test_another_backbone_is_named_with_both_sizes(tmp_path):
    source = copy_golden(tmp_path / "published", change_config=lambda settings: settings | {"d_model": 32})
    with pytest.raises(CheckpointError, match=r"is \[\d+, 64\], expected \[\d+, 32\].*use the config.json of this"):
        import_checkpoint(source, tmp_path / "out")


def test_missing_and_unexpected_tensors_are_all_named(tmp_path):
    def damage(weights):
        return without("encoder.gate_dense.bias", "decoder.final_layer_norm.weight")(weights) | {
            "perceiver.weight": torch.zeros(2)
        }

    source = copy_golden(tmp_path / "published", change_weights=damage)
    expected = "missing decoder.final_layer_norm.weight, encoder.gate_dense.bias; unexpected perceiver.weight"
    with pytest.raises(CheckpointError, match=expected):
        import_checkpoint(source, tmp_path / "out")


def test_plain_t5_is_refused_as_one_without_vision(tmp_path):
    names = [name for name in load_file(GOLDEN / "model.safetensors") if name.split(".")[1] in FUSION_PARTS]
    source = copy_golden(tmp_path / "published", change_weights=without(*names))
    with pytest.raises(CheckpointError, match="no encoder.image_dense.weight.*T5 without vision"):
        import_checkpoint(source, tmp_path / "out")


def test_output_layer_that_should_be_tied_and_is_not_is_refused(tmp_path):
    source = copy_golden(
        tmp_path / "published", change_weights=lambda weights: weights | {"lm_head.weight": torch.ones(200, 64)}
    )
    with pytest.raises(CheckpointError, match="lm_head.weight .* differs from shared.weight.*tie_word_embeddings"):
        import_checkpoint(source, tmp_path / "out")


def test_fusion_tensor_under_both_names_is_refused(tmp_path):
    source = copy_golden(
        tmp_path / "published", change_weights=lambda weights: weights | {"gate_dense.bias": torch.zeros(64)}
    )
    with pytest.raises(CheckpointError, match="encoder.gate_dense.bias both with and without"):
        import_checkpoint(source, tmp_path / "out")


class RunsOnLoad:
    """An object whose unpickling would call a function."""

    def __reduce__(self):
        return (print, ("executed",))


def test_pickle_that_would_run_code_is_not_opened(tmp_path, capsys):
    shutil.copytree(GOLDEN, tmp_path / "published")
    (tmp_path / "published" / "model.safetensors").unlink()
    torch.save({"shared.weight": RunsOnLoad()}, tmp_path / "published" / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match=r"pytorch_model\.bin holds Python objects, such as print, .*never loaded"
    ):
        import_checkpoint(tmp_path / "published", tmp_path / "out")
    (tmp_path / "published" / "pytorch_model.bin").write_bytes(pickle.dumps(RunsOnLoad(), protocol=2))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle of Python, which is never loaded"):
        import_checkpoint(tmp_path / "published", tmp_path / "out")
    assert "executed" not in capsys.readouterr().out


def test_folder_without_weights_or_configuration_says_what_is_expected(tmp_path):
    with pytest.raises(CheckpointError, match="config.json does not exist"):
        import_checkpoint(tmp_path, tmp_path / "out")
    shutil.copy(GOLDEN / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match="none of model.safetensors, pytorch_model.bin"):
        import_checkpoint(tmp_path, tmp_path / "out")


def test_output_folder_with_files_in_it_is_left_alone(tmp_path):
    source = copy_golden(tmp_path / "published")
    with pytest.raises(CheckpointError, match="is not empty; give a new one"):
        import_checkpoint(source, source)
    assert "patch_size" in (source / "config.json").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_saving_and_opening_again_changes_no_bit(kind, tmp_path):
    model, weights = random_model(kind, tmp_path)
    model.save_pretrained(tmp_path / "again")
    again = T5ForMultimodalGeneration.from_pretrained(tmp_path / "again")
    saved = dict(again.named_parameters())
    assert saved.keys() == weights.keys()
    assert all(torch.equal(saved[name], weights[name]) for name in weights)
    assert (again.lm_head.weight is again.shared.weight) == (kind == "tied")


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_closed_gate_is_the_plain_t5_of_transformers(kind, tmp_path):
    model, weights = random_model(kind, tmp_path)
    model.encoder.gate_dense.weight.zero_()
    model.encoder.gate_dense.bias.fill_(-1e4)
    plain_folder = tmp_path / "plain"
    T5Config(**{name: value for name, value in KINDS[kind].items() if "vision" not in name}).save_pretrained(
        plain_folder
    )
    (plain_folder / "config.json").write_text(
        json.dumps(json.loads((plain_folder / "config.json").read_text()) | {"tie_word_embeddings": kind == "tied"})
    )
    plain_weights = {name: tensor for name, tensor in weights.items() if name.split(".")[1] not in FUSION_PARTS}
    save_file(plain_weights, plain_folder / "model.safetensors", metadata={"format": "pt"})
    plain = T5ForConditionalGeneration.from_pretrained(plain_folder).eval()
    assert torch.equal(plain.lm_head.weight, model.lm_head.weight)
    assert torch.equal(plain.shared.weight, model.shared.weight)

    ids, labels = torch.randint(2, 50, (2, 9)), torch.randint(2, 50, (2, 6))
    features = torch.randn(2, 3, 5)
    ours, theirs = model(input_ids=ids, labels=labels, vision_features=features), plain(input_ids=ids, labels=labels)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-5, atol=1e-6)  # the layers round differently
    ours = model.generate(ids, vision_features=features, max_new_tokens=12, do_sample=False)
    assert torch.equal(ours, plain.generate(ids, max_new_tokens=12, do_sample=False))


BASE = {"vocab_size": 32128, "d_model": 768, "d_kv": 64, "num_layers": 12, "num_heads": 12}
FLAN = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "vision_num_patches": 145, "vision_dim": 1024}
FLAN_LARGE = FLAN | {"vocab_size": 32128, "d_model": 1024, "d_kv": 64, "num_layers": 24, "num_heads": 16, "d_ff": 2816}


# The published models' numbers of parameters (tied ones counted once).
@pytest.mark.parametrize(
    ("settings", "num_parameters"),
    [
        (BASE | {"d_ff": 3072, "vision_num_patches": 100, "vision_dim": 256}, 226_643_712),
        (BASE | FLAN | {"d_ff": 2048}, 251_907_840),
        (FLAN_LARGE, 790_496_256),
    ],
    ids=["unifiedqa-base-detr", "flan-base-vit", "flan-large-vit"],
)
def test_published_sizes_have_the_published_number_of_parameters(settings, num_parameters):
    with torch.device("meta"):
        model = T5ForMultimodalGeneration(MultimodalT5Config(**settings))
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters
