"""Features of the published kind become shards: one array for all questions and a map from qid to row."""

from __future__ import annotations

import json
import shutil
from collections import Counter

import numpy as np
import pytest
import torch

from data_shards.reader import SplitReader
from data_shards.ready_made_features import FeatureError, ready_made_features
from launcher.config.loading import load_settings
from launcher.config.settings import SettingsError
from launcher.data.build import prepare_data
from launcher.pipeline.preflight import check_settings
from mmcot.texts.sample import Sample


@pytest.fixture
def source(workplace, tiny_data, tmp_path):
    """MiniSQA in ScienceQA's layout, with DETR-shaped features for its image questions."""
    folder = tmp_path / "source"
    shutil.copytree(next(workplace.glob("mini_sqa-source-*")), folder)
    problems = json.loads((folder / "problems.json").read_text())
    with_image = [qid for qid, record in problems.items() if record["image"]]
    (folder / "vision_features").mkdir()
    (folder / "name_map.json").write_text(json.dumps({qid: str(row) for row, qid in enumerate(with_image)}))
    array = np.random.default_rng(0).standard_normal((len(with_image), 100, 256)).astype(np.float32)
    np.save(folder / "vision_features" / "detr.npy", array)
    return folder, array, with_image


def build(folder, tmp_path, name="detr", *, to_train=False):
    settings = load_settings(
        preset="demo",
        overrides=[
            f"data.path={folder}",
            f"data.shards_dir={tmp_path / 'shards'}",
            f"data.features={name}",
            "data.samples_per_shard=24",
        ],
    )
    check_settings(settings)
    return prepare_data(settings, lambda line: None, to_train=to_train)


def test_rows_are_joined_by_qid_and_questions_without_one_have_no_patch(source, tmp_path):
    folder, array, with_image = source
    data = build(folder, tmp_path)
    reader = SplitReader(data.path, "train", features="detr")
    assert reader.feature_shape == (100, 256)
    for number, qid in enumerate(reader.qids):
        expected = (
            array[with_image.index(qid)].astype(np.float16) if qid in with_image else np.zeros((0, 256), np.float16)
        )
        np.testing.assert_array_equal(reader.features(number), expected)


def test_two_features_share_one_build_of_the_text(source, tmp_path):
    first, second = build(source[0], tmp_path, "detr"), build(source[0], tmp_path, "patch")
    assert first.path == second.path and first.text == second.text
    assert {path.name for path in (first.path / "features").iterdir()} == {"detr", "patch"}


def test_features_of_pictures_that_have_changed_are_refused_and_say_what_was(source, tmp_path):
    folder, _, _ = source
    build(folder, tmp_path, "patch")
    shutil.rmtree(folder / "images" / "train")
    with pytest.raises(SettingsError, match=r"features/patch was made of other pictures .* or restore the pictures"):
        build(folder, tmp_path, "patch", to_train=True)


def test_a_pth_tensor_gives_the_same_shards_as_an_npy(source, tmp_path):
    folder, array, _ = source
    first = build(folder, tmp_path / "npy").features["shards"]
    (folder / "vision_features" / "detr.npy").unlink()
    torch.save(torch.from_numpy(array), folder / "vision_features" / "detr.pth")
    assert build(folder, tmp_path / "pth").features["shards"] == first


def test_a_pooled_vector_that_was_repeated_is_stored_once():
    array = np.repeat(np.arange(6, dtype=np.float32).reshape(2, 1, 3), 512, axis=1)
    features_of, shape = ready_made_features(array, {"a": "0", "b": "1"}, name="resnet.npy")
    assert shape == (1, 3)
    np.testing.assert_array_equal(features_of(make_problem("b"), Counter()), [[3, 4, 5]])


def make_problem(qid):
    return Sample(qid=qid, question="?", choices=("a", "b"), answer=0, images=("image.png",))


def test_a_picture_without_a_row_is_counted_as_absent():
    counts = Counter()
    features_of, _ = ready_made_features(np.ones((1, 2, 3), np.float32), {"a": "0"}, name="x.npy")
    assert features_of(make_problem("z"), counts).shape == (0, 3) and counts["num_picture_absent"] == 1


@pytest.mark.parametrize(
    ("array", "name_map", "message"),
    [
        (np.ones((2, 3), np.float32), {"a": "0"}, r"shape \(2, 3\).*expected floats \[rows, patches, width\]"),
        (np.ones((1, 2, 3), np.int32), {"a": "0"}, "type int32"),
        (
            np.ones((1, 2, 3), np.float32),
            {"a": "5"},
            "has 1 rows, name_map.json names 1 beyond them .question a: row 5",
        ),
    ],
)
def test_an_array_that_cannot_be_is_refused(array, name_map, message):
    with pytest.raises(FeatureError, match=message):
        ready_made_features(array, name_map, name="x.npy")


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_a_value_that_is_no_float16_is_named_with_its_row(value):
    array = np.random.default_rng(0).standard_normal((2, 2, 3)).astype(np.float32)
    array[1, 0, 0] = value
    features_of, _ = ready_made_features(array, {"a": "0", "b": "1"}, name="x.npy")
    features_of(make_problem("a"), Counter())
    with pytest.raises(FeatureError, match=r"x.npy, row 1 \(question b\) holds NaN"):
        features_of(make_problem("b"), Counter())


def test_features_of_another_shape_than_the_published_are_refused(source, tmp_path):
    folder, array, _ = source
    np.save(folder / "vision_features" / "detr.npy", array[:, :50])
    with pytest.raises(FeatureError, match=r"rows of shape \(50, 256\), published detr features have \(100, 256\)"):
        build(folder, tmp_path)


def test_a_missing_map_is_named(source, tmp_path):
    folder, _, _ = source
    (folder / "name_map.json").unlink()
    with pytest.raises(SettingsError, match="name_map.json; put both there"):
        build(folder, tmp_path)


def test_the_fusion_sees_a_pooled_vector_as_its_copies():
    from mmcot.models.t5 import MultimodalT5Config, T5ForMultimodalGeneration

    torch.manual_seed(0)
    config = MultimodalT5Config(
        vocab_size=20,
        d_model=8,
        d_kv=4,
        d_ff=8,
        num_layers=1,
        num_heads=2,
        vision_num_patches=512,
        vision_dim=3,
        decoder_start_token_id=0,
    )
    model, ids, vector = (
        T5ForMultimodalGeneration(config).eval(),
        torch.ones(1, 4, dtype=torch.long),
        torch.randn(1, 1, 3),
    )
    logits = [model(input_ids=ids, labels=ids, vision_features=v).logits for v in (vector, vector.expand(1, 512, 3))]
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)


def test_absent_patches_are_attended_as_published_unless_the_model_masks_them():
    from mmcot.models.t5 import MultimodalT5Config, T5ForMultimodalGeneration

    ids, zeros, hidden = torch.ones(1, 4, dtype=torch.long), torch.zeros(1, 5, 3), torch.zeros(1, 5, dtype=torch.bool)

    def logits(mask_absent, features, mask):
        torch.manual_seed(0)
        config = MultimodalT5Config(
            vocab_size=20,
            d_model=8,
            d_kv=4,
            d_ff=8,
            num_layers=1,
            num_heads=2,
            vision_num_patches=5,
            vision_dim=3,
            decoder_start_token_id=0,
            mask_absent_patches=mask_absent,
        )
        model = T5ForMultimodalGeneration(config).eval()
        torch.nn.init.normal_(model.encoder.image_dense.bias)
        return model(input_ids=ids, labels=ids, vision_features=features, vision_mask=mask).logits

    seen = torch.ones(1, 5, dtype=torch.bool)
    assert torch.equal(logits(False, zeros, hidden), logits(False, zeros, seen))
    assert not torch.allclose(logits(True, zeros, hidden), logits(True, zeros, seen))


def test_published_features_may_lie_in_a_folder_of_their_own_with_their_map_beside_them(source, tmp_path):
    folder, array, with_image = source
    shutil.move(folder / "vision_features", tmp_path / "published")
    shutil.move(folder / "name_map.json", tmp_path / "published" / "name_map.json")
    np.save(tmp_path / "published" / "resnet.npy", array[:, 0, :1].repeat(2048, axis=1))  # one vector a row
    settings = load_settings(
        preset="demo",
        overrides=[
            f"data.path={folder}",
            f"data.shards_dir={tmp_path / 'shards'}",
            "data.features=resnet",
            f"data.vision_features={tmp_path / 'published'}",
        ],
    )
    check_settings(settings)
    data = prepare_data(settings, lambda line: None)
    reader = SplitReader(data.path, "train", features="resnet")
    assert reader.feature_shape == (1, 2048)
    number = next(n for n, qid in enumerate(reader.qids) if qid in with_image)
    assert reader.features(number)[0, 0] == np.float16(array[with_image.index(reader.qids[number]), 0, 0])
