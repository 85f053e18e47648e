"""Fixtures: a small MiniSQA as a data folder, made once a session."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shutil

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from chromium import NAMES, Chromium, find_chromium

RAY_STARTS: list[str] = []  # a line a call of ray.init in this process
RAY_FIXTURES: list[
    object
] = []  # fixtures that made one: a test that asks for them uses Ray as well (names come more than once)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef, request):
    before = len(RAY_STARTS)
    try:
        return (yield)
    finally:
        if len(RAY_STARTS) > before:
            RAY_FIXTURES.append(fixturedef)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    marked = item.get_closest_marker("ray") or item.get_closest_marker("cluster")
    before = len(RAY_STARTS)
    result = yield
    asked_for = [fixture for fixtures in item._fixtureinfo.name2fixturedefs.values() for fixture in fixtures]
    uses = [fixture.argname for fixture in asked_for if any(fixture is known for known in RAY_FIXTURES)] or RAY_STARTS[
        before:
    ]
    if uses and not marked:
        pytest.fail(f"{item.nodeid} starts Ray ({uses[0]}) and lacks the marker: add @pytest.mark.ray")
    return result


@pytest.fixture(scope="session", autouse=True)
def _note_starts_of_ray():
    """Have every ray.init of this process noted, so that a test without the marker ``ray`` is found."""
    import ray

    start = ray.init

    def noted(*arguments, **options):
        RAY_STARTS.append("ray.init")
        return start(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray, "init", noted)
        yield


def pytest_collection_modifyitems(items):
    """Put tests that share a Ray first, so that it is started once; then those that start processes."""
    items.sort(key=lambda item: ("ray_up" not in item.fixturenames, not starts_processes(item)))


def starts_processes(item):
    """Whether a test starts a Ray of its own, or other processes."""
    return any(item.get_closest_marker(name) for name in ("ray", "processes"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Start the shared Ray before a test that uses it, and end it before a test that starts a Ray of its own."""
    if "ray_up" in item.fixturenames:
        if not item.get_closest_marker("ray"):
            pytest.fail(f"{item.nodeid} uses the shared Ray and lacks the marker: add @pytest.mark.ray")
        start_shared_ray()
    elif item.get_closest_marker("ray"):
        end_shared_ray()


SHARED_RAY: list[contextlib.ExitStack] = []


def start_shared_ray():
    if not SHARED_RAY:
        from launcher.cluster.ray_session import ray_session
        from launcher.config.loading import load_settings

        SHARED_RAY.append(contextlib.ExitStack())
        SHARED_RAY[0].enter_context(ray_session(load_settings(preset="demo").cluster))


def end_shared_ray():
    if SHARED_RAY:
        SHARED_RAY.pop().close()


@pytest.fixture(scope="session")
def ray_up():
    """A local Ray of two processors, shared by the tests that only use it."""
    yield
    end_shared_ray()


TINY = [
    "data.mini_sqa.num_train=64",
    "data.mini_sqa.num_val=16",
    "data.mini_sqa.num_test=16",
    "data.samples_per_shard=24",
    "training.log_every=1",
    "rationale.max_target_tokens=48",
    "generation.task_samples=16",
]


@pytest.fixture(scope="session")
def workplace(tmp_path_factory):
    """A folder that data and runs may be written to; relative paths start here."""
    return tmp_path_factory.mktemp("workplace")


@pytest.fixture(scope="session")
def tiny_settings(workplace):
    """The demo preset at a size of seconds."""
    from launcher.config.loading import load_settings

    return load_settings(preset="demo", overrides=[*TINY, f"data.shards_dir={workplace / 'shards'}"])


@pytest.fixture(scope="session")
def tiny_data(workplace, tiny_settings):
    """A finished data folder of 64 + 16 + 16 questions, in three training shards."""
    from launcher.data.build import prepare_data

    before = os.getcwd()
    os.chdir(workplace)
    try:
        return prepare_data(tiny_settings, lambda line: None)
    finally:
        os.chdir(before)


@pytest.fixture(scope="session")
def corrected_data(tiny_data, workplace):
    """The tiny data folder with 6 of its 64 training texts corrected, each as long as before."""
    from data_shards.manifest import manifest_shards, read_problems
    from data_shards.sealed_json import commit_sealed
    from data_shards.sources.question_set import SPLITS, QuestionSet
    from data_shards.writer import write_text_shards
    from launcher.stages.data_folder import DataFolder

    problems = {
        split: [
            problem
            for shard in manifest_shards(tiny_data.text, split)
            for problem in read_problems(tiny_data.path / "text", shard)
        ]
        for split in SPLITS
    }
    for number, problem in enumerate(problems["train"][:6]):
        problems["train"][number] = dataclasses.replace(problem, question=problem.question[::-1])
    folder = workplace / "corrected"
    shutil.copytree(tiny_data.path, folder)
    shutil.rmtree(folder / "text")
    text = write_text_shards(QuestionSet(problems, pictures=lambda problem: []), folder, samples_per_shard=24)
    features = tiny_data.features | {"text_fingerprint": text["fingerprint"]}
    commit_sealed(folder / "features" / "patch" / "manifest.json", features)
    return DataFolder(folder, text, features)


@pytest.fixture(scope="session")
def make_job(tiny_settings, tiny_data, workplace):
    """A function that prepares a stage-one training of five steps in a folder of its own."""
    from data_shards.atomic_files import commit_json
    from launcher.stages.build_model import build_model
    from launcher.stages.jobs import TrainJob
    from launcher.stages.samples import load_tokenizer
    from launcher.stages.token_lengths import LengthsOf, cached_lengths

    tokenizer = load_tokenizer(tiny_settings, tiny_data.path)
    pretrained = workplace / "pretrained"  # so that every ZeRO stage starts from the same weights
    lengths = {}
    for split in ("train", "val"):
        whose = LengthsOf(tiny_settings, "rationale", split, str(tiny_data.path), None)
        lengths[split] = str(cached_lengths(whose, samples := whose.open(), workplace / "lengths", {"split": split}))
    build_model(tiny_settings, samples).save_pretrained(pretrained)
    tokenizer.save_pretrained(pretrained)

    def make(name, **training):
        changes = {
            "checkpoint_every": 2,
            "validate_every": 1,
            "micro_batch_size": 4,
            "global_batch_size": 12,
            "zero_stage": 1,
        } | training
        sections = {
            "training": tiny_settings.training.model_copy(update=changes),
            "model": tiny_settings.model.model_copy(update={"pretrained": str(pretrained)}),
        }
        settings = tiny_settings.model_copy(update=sections)
        folder = workplace / "trainings" / name
        shutil.rmtree(folder, ignore_errors=True)
        commit_json(folder / "lock.json", {"attempt": 1})
        return TrainJob(
            stage="rationale",
            settings=settings,
            run_dir=str(folder),
            shards_dir=str(tiny_data.path),
            lengths=lengths,
            num_steps=5,
            attempt=1,
        )

    return make


@pytest.fixture(scope="session")
def s3(tiny_data):
    """The tiny data folder in a bucket of a real S3 server; yields its URL."""
    import s3fs
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request otherwise
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    filesystem = s3fs.S3FileSystem()
    filesystem.mkdir("bucket")
    filesystem.put(str(tiny_data.path) + "/", "bucket/data/", recursive=True)
    yield "s3://bucket/data"
    server.stop()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture(scope="session")
def model_dir(tiny_settings, tiny_data, workplace):
    """A stage-one model of random weights, exported as training exports it."""
    from launcher.stages.build_model import build_model
    from launcher.stages.samples import load_tokenizer, open_stage

    tokenizer = load_tokenizer(tiny_settings, tiny_data.path)
    samples = open_stage(tiny_settings, "rationale", "train", shards_dir=tiny_data.path, tokenizer=tokenizer, texts={})
    build_model(tiny_settings, samples).save_pretrained(workplace / "model")
    tokenizer.save_pretrained(workplace / "model")
    return workplace / "model"


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium for all tests; where one is required (``.ci/run``), its absence is a failure."""
    if find_chromium() is None:
        missing = f"no browser: none of {', '.join(NAMES)} is installed"
        pytest.fail(missing) if os.environ.get("MMCOT_REQUIRE_BROWSER") else pytest.skip(missing)
    with Chromium() as browser:
        yield browser
