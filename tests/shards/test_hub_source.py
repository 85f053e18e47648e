"""Data sets of the Hugging Face Hub, on a Hub that is not there: read once, by commit, or refused in a sentence."""

from __future__ import annotations

import io
import shutil

import datasets
import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError
from PIL import Image
from typer.testing import CliRunner

from data_shards.atomic_files import read_json
from launcher.cli import app
from launcher.cluster.job_submission import for_cluster
from launcher.config.loading import load_settings
from launcher.data.build import prepare_data
from launcher.data.dataset import kept_source, read_source, source_folder
from launcher.data.hub_source import HubPlace, hub_folder, hub_place
from launcher.pipeline.preflight import check_settings
from launcher.report.questions import find_pictures
from launcher.runs.run_dir import RunDir
from mmcot.errors import InputError

COMMIT, LATER = "1" * 40, "2" * 40
URL = "hf://me/quiz"


def png(grey):
    stream = io.BytesIO()
    Image.new("L", (8, 8), grey).save(stream, "PNG")
    return stream.getvalue()


class Hub:
    """A Hub with one data set; ``error`` is what its API raises."""

    def __init__(self, folder):
        self.folder = folder
        self.commit, self.error, self.loads, self.cached = COMMIT, None, [], None

    def dataset_info(self, api, repo, *, revision=None, timeout=None):
        if self.error is not None:
            raise self.error
        return huggingface_hub.hf_api.DatasetInfo(
            id=repo, sha=self.commit, private=False, downloads=0, likes=0, tags=[]
        )

    def load_dataset(self, repo, config=None, *, revision=None):
        self.loads.append((repo, config, revision))
        features = datasets.Features(
            {"question": datasets.Value("string"), "choices": datasets.List(datasets.Value("string"))}
            | {"answer": datasets.ClassLabel(names=["sun", "moon"]), "image": datasets.Image()}
        )
        row = {"question": "Which?", "choices": ["sun", "moon"], "answer": 1, "image": {"bytes": png(9), "path": None}}
        parts = {
            split: datasets.Dataset.from_list([row], features=features) for split in ("train", "validation", "test")
        }
        if self.cached is not None:  # as the cache of datasets has them: files in a folder named by the commit
            folder = self.folder / self.cached
            for split, part in parts.items():
                part.save_to_disk(folder.parent / "made" / split)
                folder.mkdir(exist_ok=True, parents=True)
                shutil.copy(folder.parent / "made" / split / "data-00000-of-00001.arrow", folder / f"{split}.arrow")
            parts = {split: datasets.Dataset.from_file(str(folder / f"{split}.arrow")) for split in parts}
        return datasets.DatasetDict(parts)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    hub = Hub(tmp_path / "cached")
    monkeypatch.setattr(datasets, "load_dataset", hub.load_dataset)
    monkeypatch.setattr(
        huggingface_hub.HfApi, "dataset_info", lambda *given, **named: hub.dataset_info(*given, **named)
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf-cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return hub


def settings_of(tmp_path, url=URL, *overrides):
    given = [f"data.path={url}", f"data.shards_dir={tmp_path / 'out'}", f"data.cache_dir={tmp_path / 'cache'}"]
    return load_settings(preset="demo", overrides=[*given, *overrides])


def fetched(tmp_path, url=URL):
    return source_folder(settings_of(tmp_path, url).data, lambda line: None)


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("hf://me/quiz", ("me/quiz", None, None)),
        ("hf://datasets/me/quiz@v1.0", ("me/quiz", "v1.0", None)),
        ("hf://me/quiz@refs/convert/parquet:en", ("me/quiz", "refs/convert/parquet", "en")),
        ("hf://me/quiz:en-US", ("me/quiz", None, "en-US")),
    ],
)
def test_a_url_names_data_set_revision_and_configuration(url, parts):
    assert hub_place(url) == HubPlace(url, *parts)


@pytest.mark.parametrize("url", ["hf://quiz", "hf://me/quiz/data", "hf://", "hf://me/quiz@", "hf://me/quiz:en@v1"])
def test_a_url_of_another_form_is_refused_before_any_work(tmp_path, url):
    with pytest.raises(InputError, match="expected hf://org/name"):
        check_settings(settings_of(tmp_path, url))


def test_shards_are_built_of_a_data_set_of_the_hub_with_its_commit(tmp_path, hub):
    said = []
    folder = prepare_data(settings_of(tmp_path), said.append)
    assert folder.text["num_samples"] == {"train": 1, "val": 1, "test": 1}
    assert folder.features and folder.features["counts"]["train"]["num_with_features"] == 1
    assert read_json(folder.path / "inputs.json")["commit"] == COMMIT
    assert hub.loads == [("me/quiz", None, COMMIT)]
    assert any(line.startswith(f"{URL} is commit {COMMIT}, kept in ") for line in said)


def test_a_second_command_needs_no_hub(tmp_path, hub):
    first = prepare_data(settings_of(tmp_path), lambda line: None)
    hub.error = OfflineModeIsEnabled("offline")
    again = prepare_data(settings_of(tmp_path), lambda line: None)
    assert len(hub.loads) == 1 and again.text == first.text


def test_a_class_label_is_an_index_and_pictures_are_in_the_rows(tmp_path, hub):
    settings = settings_of(tmp_path)
    questions = read_source(settings.data, fetched(tmp_path))
    (sample,) = questions.problems["train"]
    assert (sample.qid, sample.answer, questions.pictures(sample)) == ("train-0", 1, [png(9)])


def test_the_report_finds_the_pictures_of_a_data_set_of_the_hub(tmp_path, hub):
    settings = settings_of(tmp_path)
    folder = prepare_data(settings, lambda line: None)
    assert find_pictures(RunDir(tmp_path / "run"), settings, folder.path) is not None
    assert kept_source(settings.data) == hub_folder(URL, tmp_path)


def test_every_revision_and_configuration_has_its_own_folder(tmp_path, hub):
    urls = (URL, f"{URL}@v1", f"{URL}@v1:en")
    folders = {fetched(tmp_path, url) for url in urls}
    assert len(folders) == 3 and all(folder.parent == tmp_path for folder in folders)


def with_response(kind, status=404):
    import httpx2 as httpx

    return kind("no", response=httpx.Response(status, request=httpx.Request("GET", "https://hub")))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: with_response(RepositoryNotFoundError), "there is no such public data set; look at its spelling"),
        (lambda: with_response(RevisionNotFoundError), "it has no revision 'v9'; give a branch, tag or commit"),
        (lambda: with_response(GatedRepoError, 403), "it asks for permission; accept its terms on https://.*me/quiz"),
        (
            lambda: RuntimeError("Dataset scripts are no longer supported, but found quiz.py"),
            "never run; try .*parquet",
        ),
        (lambda: ValueError("Config name is missing.\nPlease pick one among: ['a', 'b']"), "as hf://me/quiz:CONFIG"),
        (lambda: KeyError("odd"), r"it cannot be read \(KeyError: 'odd'\); look at its page"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence_with_what_to_do(tmp_path, hub, make, message):
    hub.error = make()
    with pytest.raises(InputError, match=message) as error:
        fetched(tmp_path, f"{URL}@v9")
    assert str(error.value).startswith(f"data.path {URL}@v9: ") and "\n" not in str(error.value)
    assert not hub_folder(f"{URL}@v9", tmp_path).exists()


def test_without_the_hub_and_without_a_cache_it_says_so(tmp_path, hub, monkeypatch):
    hub.error = OfflineModeIsEnabled("offline")

    def load(*given, **named):
        raise ConnectionError("Couldn't reach the Hugging Face Hub")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(InputError, match="the Hub cannot be reached from here, and it is not in the cache; run once"):
        fetched(tmp_path)


def test_without_the_hub_the_cache_is_read_where_it_tells_its_commit(tmp_path, hub):
    hub.error, hub.cached = OfflineModeIsEnabled("offline"), LATER
    assert read_json(fetched(tmp_path) / "hub.json")["commit"] == LATER


def test_without_the_hub_the_cache_is_never_taken_for_another_revision(tmp_path, hub):
    hub.error, hub.cached = OfflineModeIsEnabled("offline"), LATER
    with pytest.raises(InputError, match="the cache holds commit 222222222222 instead of 111111111111"):
        fetched(tmp_path, f"{URL}@{COMMIT}")
    with pytest.raises(InputError, match="which commit it is cannot be told"):
        fetched(tmp_path, f"{URL}@v1")
    hub.cached = "odd"
    with pytest.raises(InputError, match="which commit it is cannot be told"):
        fetched(tmp_path, f"{URL}@{COMMIT}")


def test_without_the_hub_a_branch_is_the_commit_that_the_cache_last_saw(tmp_path, hub):
    hub.error, hub.cached = OfflineModeIsEnabled("offline"), LATER
    refs = tmp_path / "hf-cache" / "datasets--me--quiz" / "refs"
    refs.mkdir(parents=True)
    (refs / "v1").write_text(LATER)
    assert read_json(fetched(tmp_path, f"{URL}@v1") / "hub.json")["commit"] == LATER


def test_a_job_for_a_cluster_may_name_a_data_set_of_the_hub(tmp_path):
    settings = settings_of(tmp_path, URL, f"run.dir={tmp_path / 'run'}", "tracking.uri=http://mlflow.example:5000")
    assert for_cluster(settings).data.path == URL


def test_describe_reads_the_hub(tmp_path, hub, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["data", "describe", URL])
    assert result.exit_code == 0, result.output
    assert "3 questions" in result.output and f"commit {COMMIT}" in result.output
