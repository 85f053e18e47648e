"""Values in data, settings and the environment cannot lead out of a folder, run as code, or be shown to others."""

from __future__ import annotations

import ast
import io
import json
import os
import random
import re
import shutil
import stat
import tarfile
import time
from pathlib import Path

import pytest

from data_shards import mirror
from data_shards.atomic_files import commit_json, sha256_of_file
from data_shards.credentials import (
    find_credentials,
    hide_credentials,
    holds_credentials,
)
from data_shards.errors import ShardError
from data_shards.generated_texts import verified_files
from data_shards.index import build_index
from data_shards.indexed_tars import index_tars
from data_shards.manifest import manifest_shards, read_manifest
from data_shards.rationale_reader import RationaleReader
from data_shards.sealed_json import commit_sealed
from data_shards.sources.hf_dataset import _sample
from data_shards.sources.scienceqa import read
from data_shards.writer import missing_feature_shards
from launcher.cluster.auth_token import keep_token_private
from launcher.config.loading import load_settings, read_deepspeed
from launcher.config.settings import SettingsError
from mmcot.texts.sample import Sample, SampleError
from mmcot.texts.tokenizer import open_tokenizer

ROOT = Path(__file__).parents[2]
FILES = [path for room in ("mmcot", "data_shards", "launcher") for path in sorted((ROOT / room).rglob("*.py"))]
ROW = {"question": "Which is bigger?", "choices": ["sun", "moon"], "answer": 0}
SECRET = "pl4nted-s3cret"
USER = f"http://me:{SECRET}@host:5000"


# Secrets in settings


@pytest.mark.parametrize(
    "text",
    [
        USER,
        f"postgresql://me:{SECRET}/x@host/db",
        f"s3://{SECRET}@bucket/data",
        f"https://host/a.tar?token={SECRET}",
        f"https://host/a.tar?X-Amz-Algorithm=x&X-Amz-Signature={SECRET}",
        f"s3://bucket/a?AWSAccessKeyId={SECRET}",
        f"https://host/a?sig={SECRET}",
        f"postgresql://host/db?user=me&password={SECRET}",
        f"mmcot run --set data.path={USER}",
    ],
)
def test_a_secret_in_an_address_is_found_and_hidden(text):
    assert holds_credentials(text) and SECRET not in hide_credentials(text) and "***" in hide_credentials(text)


@pytest.mark.parametrize(
    "text",
    [
        "hf://datasets/me/questions@main/data",
        "s3://bucket/a@b/c",
        "http://store:9000/bucket/data@v2",
        "http://127.0.0.1:5000",
        "sqlite:////tmp/a@b/mlflow.db",
        "me@host",
        "https://host/a?page=3#part",
    ],
)
def test_what_is_no_secret_is_left_alone(text):
    assert not holds_credentials(text) and hide_credentials(text) == text


SLOW_USER = re.compile(r"://(?:[^/@\s]+|[^/@\s]*:(?!\d+/)[^@\s]*)@")  # the definition; it takes quadratic time
SLOW_QUERY = re.compile(
    r"([?&;#][\w.%-]*(?:token|key|secret|passw|pwd|signature|\bsig\b|credential|auth)[\w.%-]*=)[^&;#\s'\"]+",
    re.IGNORECASE,
)


def test_credentials_are_found_and_hidden_as_defined_in_texts_of_any_parts():
    parts = [
        "://",
        ":",
        "/",
        "/",
        "@",
        " ",
        "\n",
        "80",
        "a",
        ".",
        "?",
        "&",
        "=",
        "token",
        "sig",
        "KEY",
        "'",
        "%",
        "ſecret",
    ]
    draw = random.Random(0)
    for _ in range(50_000):
        text = "".join(draw.choices(parts, k=draw.randint(1, 14)))
        assert hide_credentials(text) == SLOW_QUERY.sub(r"\1***", SLOW_USER.sub("://***@", text)), text
        assert holds_credentials(text) == bool(SLOW_USER.search(text) or SLOW_QUERY.search(text)), text


@pytest.mark.parametrize(
    "part", ["://", "://a", "://:", "a:", "@", "?", "?token", "token", "?token=", "=", "a", "://a@", "a\n", "://1:1/"]
)
def test_credentials_in_a_megabyte_are_hidden_in_seconds_whatever_it_repeats(part):
    start = time.process_time()
    for head in ("", "://", "://a:", "?"):
        text = head + part * (1_000_000 // len(part))
        hide_credentials(text)
        holds_credentials(text)
    assert time.process_time() - start < 20


@pytest.mark.parametrize(
    ("override", "name"),
    [
        (f"tracking.uri={USER}", "tracking.uri"),
        (f"data.shards_dir=https://host/data?X-Amz-Signature={SECRET}", "data.shards_dir"),
        (f"data.vision_model=https://me:{SECRET}@host/model", "data.vision_model"),
        (f"model.pretrained=https://host/model?token={SECRET}", "model.pretrained"),
        (f"training.deepspeed={{comet: {{enabled: true, api_key: {SECRET}}}}}", "training.deepspeed.comet.api_key"),
        (f"tuning.space={{data.path: {{choice: [a, '{USER}']}}}}", "tuning.space.data.path.choice"),
        (f"tracking.send_every_s={USER}", "tracking.send_every_s"),  # no number either
        (f"data={USER}", "--set"),
    ],
)
def test_a_secret_in_any_setting_is_refused_by_its_name_alone(override, name):
    with pytest.raises(SettingsError) as error:
        load_settings(preset="demo", overrides=[override])
    assert name in str(error.value) and SECRET not in str(error.value)


def test_a_secret_in_a_file_of_settings_is_refused_by_its_name_alone(tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps({"comet": {"api_key": SECRET}}))
    (tmp_path / "broken.yaml").write_text(f"tracking: {{uri: '{USER}'\n")
    (tmp_path / "text.yaml").write_text(SECRET)
    for attempt in (
        lambda: read_deepspeed(str(tmp_path / "ds.json")),
        lambda: load_settings(config=tmp_path / "broken.yaml"),
        lambda: load_settings(config=tmp_path / "text.yaml"),
    ):
        with pytest.raises(SettingsError) as error:
            attempt()
        assert SECRET not in str(error.value)


def test_shipped_settings_and_deepspeeds_own_names_hold_no_secret():
    deepspeed = {
        "comet": {"enabled": True, "api_key": ""},
        "zero_optimization": {"offload_optimizer": {"device": "cpu"}},
        "tokenizer": "t5",
    }
    assert find_credentials(deepspeed, "") is None


def test_an_address_with_a_secret_is_not_opened_and_not_repeated(tmp_path):
    with pytest.raises(ShardError) as error:
        mirror.mirror_folder(f"http://127.0.0.1:9/data?token={SECRET}", tmp_path, features=None)
    assert SECRET not in str(error.value) and "environment" in str(error.value)
    with pytest.raises(ShardError, match="environment"):
        index_tars({"train": [f"http://127.0.0.1:9/a.tar?token={SECRET}"]}, tmp_path / "out")
    assert not (tmp_path / "out").exists()  # nor written down


# Names that come from data


def tar_of(path, *members, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, kind, target in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            data = json.dumps(ROW).encode() if kind == tarfile.REGTYPE else b""
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def everything_below(folder):
    return set(folder.rglob("*"))


@pytest.mark.parametrize("name", ["../../escaped.json", "/tmp/escaped.json", "a/../../escaped.json"])
def test_a_tars_member_is_never_written_whatever_its_name(tmp_path, name):
    tar = tar_of(tmp_path / "a.tar", (name, tarfile.REGTYPE, ""))
    before = everything_below(tmp_path)
    index_tars({"train": [tar]}, tmp_path / "out")
    assert everything_below(tmp_path) - before == {tmp_path / "out", *everything_below(tmp_path / "out")}
    assert not [path for path in everything_below(tmp_path / "out") if "escaped" in path.name]


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.GNUTYPE_SPARSE]
)
def test_links_devices_and_sparse_members_of_a_tar_are_refused(tmp_path, kind):
    with pytest.raises(ShardError, match="not of an allowed kind|is not a readable tar"):
        build_index(tar_of(tmp_path / "a.tar", ("a.json", kind, "/etc/passwd")))


def test_a_compressed_tar_is_refused_before_it_is_unpacked(tmp_path):
    with pytest.raises(ShardError, match="is not a readable tar"):
        build_index(tar_of(tmp_path / "a.tar", ("a.json", tarfile.REGTYPE, ""), mode="w:gz"))


@pytest.mark.parametrize("qid", ["../x", "a/b", "..", "a.b", "", "a\x00b", "a\n"])
def test_a_question_id_that_would_be_another_file_is_refused(qid):
    with pytest.raises(SampleError, match="must consist of letters"):
        Sample.from_scienceqa(qid, ROW)


@pytest.mark.parametrize("image", ["../../etc/passwd", "/etc/passwd", "a/../../b", "..\\..\\b", ["ok.png", "../b.png"]])
def test_a_picture_outside_the_data_is_refused_in_every_form_of_data(tmp_path, image):
    commit_json(tmp_path / "problems.json", {"1": {**ROW, "image": image}})
    commit_json(tmp_path / "pid_splits.json", {"train": ["1"]})
    with pytest.raises(SampleError, match="must be a file name inside the data folder"):
        read(tmp_path)
    if isinstance(image, str):
        with pytest.raises(SampleError, match="must be a file name inside the data folder"):
            _sample({**ROW, "image": {"bytes": None, "path": image}}, "train", 0)


@pytest.mark.parametrize("change", [{"name": "../../x"}, {"name": "/tmp/x"}, {"split": "../../x"}, {"split": "/tmp/x"}])
def test_a_manifests_shard_cannot_name_a_file_elsewhere(tiny_data, tmp_path, change):
    manifest = read_manifest(tiny_data.path / "text")
    changed = {**manifest, "shards": [{**shard, **change} for shard in manifest["shards"]]}
    with pytest.raises(ShardError, match="names a shard"):
        manifest_shards(changed)
    commit_sealed(tmp_path / "text" / "manifest.json", changed)
    with pytest.raises(ShardError, match="names a shard"):
        missing_feature_shards(tmp_path, name="patch")


@pytest.mark.parametrize(
    "name", ["train/../../outside-1.jsonl", "../000000-000000.jsonl", "/{elsewhere}", "exam/000000-000000.jsonl"]
)
def test_a_manifests_rationale_file_cannot_lie_elsewhere(tmp_path, name):
    outside = tmp_path / "outside-1.jsonl"
    outside.write_text('{"qid": "1", "rationale": "x"}\n')
    name = name.replace("/{elsewhere}", str(outside))
    commit_json(
        tmp_path / "out" / "manifest.json",
        {"inputs": {}, "complete": True, "files": {name: {"sha256": sha256_of_file(outside), "num_samples": 1}}},
    )
    for attempt in (lambda: verified_files(tmp_path / "out"), lambda: RationaleReader(tmp_path / "out", "train")):
        with pytest.raises(ShardError, match="names a file"):
            attempt()


@pytest.mark.parametrize("name", ["../../elsewhere/step-000001", "/tmp/step-000001", "", "step-x"])
def test_latest_cannot_name_a_checkpoint_elsewhere(tmp_path, name):
    from launcher.runs.checkpoint_names import CheckpointError, latest_checkpoint

    (tmp_path / "LATEST").write_text(f"{name}\n")
    with pytest.raises(CheckpointError, match="expected such as step-000400"):
        latest_checkpoint(tmp_path)


@pytest.mark.parametrize("file", ["../../outside", "/tmp/outside", "a/../../../outside"])
def test_a_stored_checkpoints_files_cannot_lie_elsewhere(tmp_path, monkeypatch, file):
    from launcher.runs.checkpoint_names import CheckpointError
    from launcher.training import checkpoint_store

    manifest = json.dumps({"files": {file: {}}}).encode()
    monkeypatch.setattr(checkpoint_store, "agreed", lambda ask: ask())
    monkeypatch.setattr(checkpoint_store.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(checkpoint_store.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(checkpoint_store.dist, "barrier", lambda: None)
    monkeypatch.setattr(checkpoint_store, "read_file", lambda url: b"step-000001\n")
    fetched = []
    monkeypatch.setattr(
        checkpoint_store,
        "fetch_file",
        lambda url, target: (fetched.append(Path(target)), Path(target).write_bytes(manifest)),
    )
    with pytest.raises(CheckpointError, match="names files outside its folder"):
        checkpoint_store.fetch_checkpoint("s3://bucket/a", tmp_path / "run", may_commit=lambda: None)
    assert [path.name for path in fetched] == ["manifest.json"]


@pytest.mark.parametrize("name", ["..", ".", "a/b", ".hidden", ""])
def test_a_runs_name_is_a_folder_beside_the_others(name):
    with pytest.raises(SettingsError, match="run.name"):
        load_settings(preset="demo", overrides=[f"run.name='{name}'"])


# Code that comes from data


def calls_of(path):
    """(dotted name, {keyword: constant}) of every call in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield (
                ast.unparse(node.func),
                {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords},
            )


NEVER = re.compile(
    r"(eval|exec|compile|__import__|os\.(system|popen)|os\.(exec|spawn)\w+|subprocess\.(getoutput|getstatusoutput)|evaluate\.load"
    r"|(c?pickle|cloudpickle|dill|marshal|shelve|joblib|pickle5)\.\w+|yaml\.(load|load_all|full_load|unsafe_load)|pandas\.read_pickle|\w+\.extractall)"
)


def what_would_run_code(name, keywords):
    """Why a call could run what stands in data, or None."""
    if NEVER.fullmatch(name):
        return name
    if keywords.get("shell") or keywords.get("trust_remote_code"):
        return f"{name} with a shell or with code from the hub"
    if name == "torch.load" and keywords.get("weights_only") is not True:
        return "torch.load without weights_only=True"
    if name in ("np.load", "numpy.load", "np.lib.format.read_array") and keywords.get("allow_pickle") is not False:
        return f"{name} without allow_pickle=False"
    if name.endswith("Image.open") and "formats" not in keywords:
        return f"{name} with every decoder that Pillow has, Ghostscript among them"
    return None


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_call_runs_what_stands_in_data(path):
    assert [found for call in calls_of(path) if (found := what_would_run_code(*call))] == []


OPENS_OF_TRANSFORMERS = ("from_pretrained", "from_config", "get_config_dict", "pipeline")
SCRIPTS = sorted((ROOT / "benchmarks").rglob("*.py"))


@pytest.mark.parametrize("path", [*FILES, *SCRIPTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_every_call_that_opens_something_of_transformers_refuses_code_that_comes_with_it(path):
    opens = [call for call in calls_of(path) if call[0].rpartition(".")[2] in OPENS_OF_TRANSFORMERS]
    assert [name for name, keywords in opens if keywords.get("trust_remote_code") is not False] == []


def test_the_calls_that_open_something_of_transformers_are_found():
    found = [name for path in FILES for name, _ in calls_of(path) if name.endswith(".from_pretrained")]
    assert len(found) >= 8  # a search that finds none would let everything pass


@pytest.mark.parametrize("place", ["tokenizer_config.json", "config.json"])
def test_code_in_the_folder_of_a_tokenizer_is_never_run_and_a_sentence_says_so(tiny_data, tmp_path, monkeypatch, place):
    folder, ran = tmp_path / "tokenizer", tmp_path / "ran"
    shutil.copytree(tiny_data.path / "tokenizer", folder)
    code = f"open({str(ran)!r}, 'w').close()\nclass Mine: pass\n"
    (folder / "own.py").write_text(code)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    auto_map = {"AutoTokenizer": ["own.Mine", "own.Mine"], "AutoConfig": "own.Mine"}
    if place == "config.json":
        settings.pop("tokenizer_class", None)
        commit_json(folder / "config.json", {"model_type": "mine", "auto_map": auto_map})
    else:
        settings |= {"tokenizer_class": "Mine", "auto_map": auto_map}
    commit_json(folder / "tokenizer_config.json", settings)
    monkeypatch.setattr("builtins.input", lambda *question: "y")  # transformers asks in a terminal
    if place == "config.json":  # the class of the configuration is not needed
        assert open_tokenizer(folder)("a b").input_ids
    else:
        with pytest.raises(ValueError, match="needs code that comes with it .* which is never run"):
            open_tokenizer(folder)
    assert not ran.exists()


def test_code_in_the_folder_of_a_model_is_never_run(model_dir, tmp_path, monkeypatch):
    from mmcot.models.opening import open_model

    folder, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(model_dir, folder)
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Mine: pass\n")
    config = json.loads((folder / "config.json").read_text())
    commit_json(folder / "config.json", config | {"auto_map": {"AutoConfig": "own.Mine", "AutoModel": "own.Mine"}})
    monkeypatch.setattr("builtins.input", lambda *question: "y")
    open_model(folder)
    assert not ran.exists()


def test_the_search_for_such_calls_finds_them(tmp_path):
    lines = [
        "pickle.loads(x)",
        "eval(x)",
        "os.system(x)",
        "subprocess.run(x, shell=True)",
        "yaml.load(x)",
        "np.load(x)",
        "torch.load(x, weights_only=False)",
        "tar.extractall()",
        "Image.open(x)",
    ]
    (tmp_path / "bad.py").write_text("\n".join(lines))
    assert len([call for call in calls_of(tmp_path / "bad.py") if what_would_run_code(*call)]) == len(lines)


# Ray's token


def test_rays_token_is_made_once_and_readable_by_its_user_alone(tmp_path, monkeypatch):
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / ".ray" / "auth_token"
    keep_token_private()
    token = path.read_text()
    assert re.fullmatch(r"[0-9a-f]{64}", token) and stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)  # as Ray itself makes it
    keep_token_private()
    assert (
        path.read_text() == token
        and stat.S_IMODE(path.stat().st_mode) == 0o600
        and os.listdir(path.parent) == ["auth_token"]
    )


def test_where_home_cannot_be_written_to_rays_token_stays_in_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "")
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    keep_token_private()
    assert re.fullmatch(r"[0-9a-f]{64}", os.environ["RAY_AUTH_TOKEN"])


def test_a_token_that_is_given_is_the_one(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_TOKEN", SECRET)
    keep_token_private()
    assert os.environ["RAY_AUTH_TOKEN"] == SECRET and os.listdir(tmp_path) == []
