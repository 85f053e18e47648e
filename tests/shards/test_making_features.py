"""Features and captions made of pictures by Ray workers: resumable, counted, and what picture by picture gives."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from data_shards.atomic_files import read_json
from data_shards.reader import SplitReader
from data_shards.sources.pictures import open_picture
from launcher.config.settings import SettingsError
from launcher.data.build import prepare_data
from launcher.data.caption_tasks import write_captions
from launcher.data.dataset import read_source, source_folder
from mmcot.vision.encoders import VisionEncoder

pytestmark = pytest.mark.ray
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 64,
    "patch_size": 32,
}


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    ViTModel(ViTConfig(**SIZES)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def settings(workplace, tiny_settings, vit, tmp_path_factory):
    """The tiny data set with features of a small ViT, in a data folder of its own."""
    data = {
        "features": "vit",
        "vision_model": str(vit),
        "shards_dir": str(tmp_path_factory.mktemp("features") / "shards"),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workplace)
        yield tiny_settings.model_copy(update={"data": tiny_settings.data.model_copy(update=data)})


@pytest.fixture(scope="module")
def made(settings, ray_up):
    """The features, one of whose workers was killed with -9 after the first shard; and what a person was told."""

    def kill_one():
        folder = Path(settings.data.shards_dir) / "features" / "vit"
        while not list(folder.glob("*.done.json")):
            time.sleep(0.01)
        workers = [p for p in psutil.Process().children(recursive=True) if "FeaturesWorker" in " ".join(p.cmdline())]
        os.kill(workers[0].pid, signal.SIGKILL)

    thread, said = threading.Thread(target=kill_one), []
    thread.start()
    data = prepare_data(settings, said.append)
    thread.join(1)
    assert not thread.is_alive()
    return data, said


def test_an_encoders_features_stand_beside_the_text_as_picture_by_picture_gives_them_though_a_worker_was_killed(
    settings, vit, made
):
    data, said = made
    assert any("features vit: 5/5 shards" in line for line in said) and any(
        line.startswith("features vit: 5 patches of 32") for line in said
    )
    encoder, pictures = (
        VisionEncoder("vit", vit),
        read_source(settings.data, source_folder(settings.data, said.append)).pictures,
    )
    reader = SplitReader(data.path, "train", features="vit")
    seen = 0
    for number in range(len(reader)):
        named = pictures(problem := reader.problem(number))
        if not problem.images:
            assert reader.features(number).shape == (0, 32)
            continue
        expected = encoder.encode([open_picture(named[0], name="picture")])[0]
        np.testing.assert_allclose(reader.features(number).astype(np.float32), expected.astype(np.float32), atol=4e-3)
        seen += 1
    assert seen == data.features["counts"]["train"]["num_with_features"] > 30
    assert not list((data.path / "features" / "vit").glob("*.done.json"))


def test_features_of_another_encoder_are_refused(settings, made, tmp_path):
    other = settings.model_copy(
        update={"data": settings.data.model_copy(update={"vision_model": str(tmp_path / "other")})}
    )
    with pytest.raises(SettingsError, match="encoder was"):
        prepare_data(other, lambda line: None)


@pytest.fixture(scope="module")
def captioner(tmp_path_factory, tiny_data):
    """A ViT with a GPT-2 that writes, of random weights."""
    folder = tmp_path_factory.mktemp("captioner")
    tokenizer = AutoTokenizer.from_pretrained(tiny_data.path / "tokenizer")
    torch.manual_seed(0)
    decoder = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, add_cross_attention=True, is_decoder=True)
    )
    model = VisionEncoderDecoderModel(encoder=ViTModel(ViTConfig(**SIZES)), decoder=decoder)
    for config in (model.config, model.generation_config):
        config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = (
            5,
            tokenizer.pad_token_id,
            tokenizer.eos_token_id,
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def test_captions_of_a_local_model_become_the_text_of_prompts(settings, captioner, ray_up, tmp_path):
    source, out, said = source_folder(settings.data, print), tmp_path / "captions.json", []
    number = write_captions(source, str(captioner), out, overrides=["cluster.num_workers=2"], report=said.append)
    content = read_json(out)
    problems = json.loads((source / "problems.json").read_text())
    assert set(content["captions"]) == {qid for qid, problem in problems.items() if problem["image"]} and number == len(
        content["captions"]
    )
    assert (
        all(isinstance(text, str) and text for text in content["captions"].values())
        and not out.with_name("captions.json.parts").exists()
    )
    data = settings.data.model_copy(
        update={"captions": str(out), "features": None, "shards_dir": str(tmp_path / "captioned")}
    )
    folder = prepare_data(settings.model_copy(update={"data": data}), said.append)
    reader = SplitReader(folder.path, "train", features=None)
    shown = {reader.qid(n): reader.problem(n).caption for n in range(len(reader))}
    assert all(caption == content["captions"].get(qid, "") for qid, caption in shown.items())
    with pytest.raises(SettingsError, match="exists; delete it"):
        write_captions(source, str(captioner), out)


def test_lists_of_the_data_set_stand_for_splits(workplace, tiny_settings, tmp_path, monkeypatch):
    monkeypatch.chdir(workplace)
    data = tiny_settings.data.model_copy(
        update={"splits": {"train": "minitrain", "test": "minitest"}, "shards_dir": str(tmp_path / "mini")}
    )
    settings = tiny_settings.model_copy(update={"data": data})
    lists = read_json(source_folder(data, print) / "pid_splits.json")
    folder = prepare_data(settings, lambda line: None)
    assert folder.text["num_samples"] == {"train": len(lists["minitrain"]), "val": 16, "test": len(lists["minitest"])}
    with pytest.raises(ValueError, match="there is no list 'tiny'"):
        data = data.model_copy(update={"splits": {"train": "tiny"}, "shards_dir": str(tmp_path / "none")})
        prepare_data(settings.model_copy(update={"data": data}), lambda line: None)
