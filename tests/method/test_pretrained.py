"""A saved model that cannot be opened is one sentence: the folder or id, the broken file, and what to do."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from mmcot import open_model
from mmcot.errors import InputError, MissingPackageError
from mmcot.models.checkpoint_import import CheckpointError, import_checkpoint
from mmcot.models.opening import check_start
from mmcot.pretrained import opening
from mmcot.texts.tokenizer import open_tokenizer
from mmcot.vision.captioning import Captioner
from mmcot.vision.encoders import VisionEncoder

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 1141234\n"
PAGE = b"<!doctype html><html><body>Sign in</body></html>"
FORBIDDEN = ("allow_pickle", "weights_only", "from_tf", "Traceback", "Error while deserializing")
STAND_INS = {"is a Git LFS pointer .*git lfs pull": LFS, "is an HTML or XML page.*download": PAGE, "is empty": b""}


@pytest.fixture
def folder(model_dir, tmp_path):
    return shutil.copytree(model_dir, tmp_path / "model")


def start(folder):
    check_start("T5ForMultimodalGeneration", str(folder))


def encode_pictures(folder):
    VisionEncoder("vit", folder)


DOORS = {
    "config.json": (open_model, start, open_tokenizer, encode_pictures, Captioner),
    "generation_config.json": (open_model, Captioner),
    "model.safetensors": (open_model,),
    "tokenizer.json": (open_tokenizer, Captioner),
    "tokenizer_config.json": (open_tokenizer,),
    "preprocessor_config.json": (encode_pictures, Captioner),
}


@pytest.mark.parametrize(("message", "content"), STAND_INS.items(), ids=["pointer", "page", "empty"])
@pytest.mark.parametrize(("name", "door"), [(name, door) for name, doors in DOORS.items() for door in doors])
def test_a_file_that_stands_in_for_another_is_named_at_every_door(name, door, message, content, folder):
    (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{folder / name} {message}") as raised:
        door(folder)
    assert not any(word in str(raised.value) for word in FORBIDDEN)


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.5, 0.999])
def test_weights_that_are_cut_off_say_what_they_have_and_should_have(share, folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(InputError, match=r"model\.safetensors (is cut off: [\d,]+ bytes, its header|of \d+ bytes)"):
        open_model(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_json_that_is_cut_off_is_named_with_its_place(name, folder):
    (folder / name).write_bytes((folder / name).read_bytes()[:-20])
    with pytest.raises(InputError, match=rf"{name} is no valid JSON at line \d+"):
        (open_model if name == "config.json" else open_tokenizer)(folder)


def test_weights_of_a_zip_under_the_name_of_safetensors_are_named(folder):
    (folder / "model.safetensors").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(InputError, match=r"model\.safetensors is a zip archive"):
        open_model(folder)


def test_weights_that_are_absent_are_said_to_be_with_what_is_there(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"a file is missing \(there are config\.json"):
        open_model(folder)


def test_weights_of_another_size_than_the_configuration_are_an_error_of_ours(folder):
    save_file({"shared.weight": torch.ones(3, 3)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"the model of the folder {folder} cannot be opened"):
        open_model(folder)


@pytest.mark.parametrize("config", ["[]", "7", "{}", '{"architectures": null}'])
def test_a_configuration_that_names_no_class_is_an_error_of_ours(config, folder):
    (folder / "config.json").write_text(config)
    with pytest.raises(InputError, match=r"config\.json names the architectures \[\]"):
        open_model(folder)


@pytest.mark.parametrize("door", [open_tokenizer, encode_pictures, Captioner, start])
@pytest.mark.parametrize("config", ["[]", '{"model_type": "no-such"}', '{"model_type": 7}'])
def test_a_configuration_of_nothing_known_is_an_error_of_ours(door, config, tmp_path):
    (tmp_path / "config.json").write_text(config)
    if door is start and config != "[]":
        return door(tmp_path)  # a backbone of any kind, which building the model refuses
    with pytest.raises(InputError, match=str(tmp_path)):
        door(tmp_path)
    return None


@pytest.mark.parametrize("door", [open_tokenizer, encode_pictures, Captioner, start])
def test_a_folder_that_is_not_there_is_said_to_be_so(door, tmp_path):
    with pytest.raises(InputError, match=f"the folder {tmp_path}/none does not exist"):
        door(tmp_path / "none")


@pytest.mark.parametrize("door", [open_tokenizer, encode_pictures, Captioner, start])
def test_a_folder_without_files_is_an_error_of_ours(door, tmp_path):
    with pytest.raises(InputError, match=str(tmp_path)):
        door(tmp_path)


def test_a_file_in_place_of_a_folder_is_said_to_be_one(folder):
    with pytest.raises(InputError, match=r"config\.json is a file; give the folder"):
        open_tokenizer(folder / "config.json")


@pytest.mark.parametrize(
    ("cause", "message"),
    [
        (
            "LocalEntryNotFoundError",
            "not in this machine's cache, and (the Hub cannot be reached|HF_HUB_OFFLINE is set)",
        ),
        ("RepositoryNotFoundError", "no such public model on the Hugging Face Hub; look at its spelling"),
        ("GatedRepoError", "asks for permission; accept its terms"),
    ],
)
def test_an_id_that_cannot_be_fetched_says_why(cause, message):
    said = f"^the tokenizer 'nobody/none' cannot be opened: .*{message}"
    with pytest.raises(InputError, match=said), opening("nobody/none", "the tokenizer"):
        raise OSError("We could not connect") from type(cause, (OSError,), {})()


def test_a_package_that_is_missing_is_said_to_be_so():
    said = "the tokenizer of nobody/none needs a package .*protobuf"
    with pytest.raises(MissingPackageError, match=said), opening("nobody/none", "the tokenizer"):
        raise ImportError("requires the protobuf library")


def test_a_lack_of_memory_is_not_said_to_be_a_broken_file(folder):
    with pytest.raises(MemoryError), opening(folder, "the model"):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")


@pytest.mark.parametrize("name", ["tokenizer.json", "spiece.model", "config.json", "model.safetensors"])
@pytest.mark.parametrize(("message", "content"), STAND_INS.items(), ids=["pointer", "page", "empty"])
def test_a_checkpoint_with_a_file_that_stands_in_for_another_is_not_imported(name, message, content, folder, tmp_path):
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name} {message}"):
        import_checkpoint(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_settings_of_a_training_beside_the_model_may_be_anything(folder):
    (folder / "trainer_state.json").write_bytes(b"")
    assert json.loads((folder / "config.json").read_text())["architectures"] == [type(open_model(folder)).__name__]
