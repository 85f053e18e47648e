"""What `mmcot submit` sends, and what it refuses before anything is sent.

tests/cluster/test_cluster.py submits to a cluster.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.cluster import job_submission as submit
from launcher.cluster.job_submission import for_cluster, submit_run, write_package
from launcher.config.loading import load_settings
from launcher.config.settings import SettingsError

SHARED = ["run.dir=/mnt/shared/runs/demo", "data.shards_dir=/mnt/shared/shards/demo"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)


def test_a_run_joins_the_cluster_it_is_sent_to_and_keeps_an_address_that_was_given():
    assert for_cluster(load_settings(preset="demo", overrides=SHARED)).cluster.address == "auto"
    given = load_settings(preset="demo", overrides=[*SHARED, "cluster.address=10.0.0.7:6379"])
    assert for_cluster(given).cluster.address == "10.0.0.7:6379"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], ["run.dir is not given", "data.shards_dir is not given", "--set run.dir=/mnt/mmcot/runs/demo"]),
        ([SHARED[0], "data.shards_dir=data/shards"], ["data.shards_dir is 'data/shards'"]),
        ([*SHARED, "data.path=ScienceQA"], ["data.path is 'ScienceQA'"]),
        ([*SHARED, "data.captions=captions.json"], ["data.captions is 'captions.json'"]),
        (["run.dir=s3://bucket/runs/demo", SHARED[1]], ["run.dir is 's3://bucket/runs/demo'"]),
        ([*SHARED, "data.cache_dir=cache"], ["data.cache_dir is 'cache'"]),
        ([*SHARED, "model.pretrained=my-t5"], ["model.pretrained is 'my-t5', a folder of this machine"]),
    ],
)
def test_folders_that_the_nodes_cannot_see_are_named_and_refused(overrides, words, tmp_path):
    (tmp_path / "my-t5").mkdir()
    with pytest.raises(SettingsError) as refused:
        for_cluster(load_settings(preset="demo", overrides=overrides))
    assert all(word in str(refused.value) for word in words)


def test_urls_hub_ids_and_a_deepspeed_file_of_this_machine_go_along(tmp_path):
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"overlap_comm": true}}')
    overrides = [
        SHARED[0],
        "data.shards_dir=s3://bucket/shards",
        "model.pretrained=google/flan-t5-base",
        "training.deepspeed=ds.json",
    ]
    settings = for_cluster(load_settings(preset="demo", overrides=overrides))
    assert settings.training.deepspeed == {"zero_optimization": {"overlap_comm": True}}


def test_this_machines_mlflow_holds_for_the_run(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking.example.org:5000")
    assert (
        for_cluster(load_settings(preset="demo", overrides=SHARED)).tracking.uri == "http://tracking.example.org:5000"
    )
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert (
        for_cluster(load_settings(preset="demo", overrides=SHARED)).tracking.uri
        == "sqlite:////mnt/shared/runs/mlflow.db"
    )


@pytest.mark.parametrize("uri", ["http://127.0.0.1:5000", "http://localhost:5000/", "sqlite:///mlflow.db"])
def test_an_mlflow_that_only_this_machine_has_is_refused(uri):
    with pytest.raises(SettingsError, match="means another place on the cluster"):
        for_cluster(load_settings(preset="demo", overrides=[*SHARED, f"tracking.uri={uri}"]))


def test_a_cluster_that_wants_another_token_and_one_that_is_not_there_are_told_in_a_sentence(monkeypatch):
    import ray.job_submission
    from ray.exceptions import AuthenticationError

    for error in (AuthenticationError("401"), ConnectionError("nobody listens")):

        def refuse(address, error=error):
            raise error

        monkeypatch.setattr(ray.job_submission, "JobSubmissionClient", refuse)
        with pytest.raises(submit.SubmitError, match="does not accept the job"):
            submit_run(load_settings(preset="demo", overrides=SHARED), address="http://127.0.0.1:8265")


def test_a_job_is_sent_with_the_settings_the_code_and_nothing_else(monkeypatch, tmp_path):
    import ray.job_submission

    sent = {}

    class Client:
        def __init__(self, address):
            self.address = address

        def submit_job(self, **values):
            sent.update(values, files={path.name for path in Path(values["runtime_env"]["working_dir"]).iterdir()})
            return values["submission_id"]

    monkeypatch.setattr(ray.job_submission, "JobSubmissionClient", Client)
    assert (
        submit_run(
            load_settings(preset="demo", overrides=SHARED),
            address="http://127.0.0.1:8265",
            follow=False,
            report=lambda line: None,
        )
        == 0
    )
    assert sent["entrypoint"] == "python -m launcher run --config run.yaml" and sent["submission_id"].startswith(
        "demo-"
    )
    assert sent["runtime_env"]["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "120"} and list(sent["runtime_env"]) == [
        "working_dir",
        "env_vars",
    ]
    assert sent["files"] == {"launcher", "mmcot", "data_shards", "run.yaml"}


def test_a_job_that_the_cluster_no_longer_knows_is_followed_no_longer():
    class Gone(Cluster):
        async def tail_job_logs(self, job):
            raise RuntimeError("Request failed with status code 404: no such job")
            yield

    shown = []
    assert submit._follow(Gone("RUNNING", None), "demo-1", shown.append) == 1
    assert "can no longer be followed" in shown[-1]


def test_ctrl_c_ends_the_following_and_not_the_job_also_while_the_connection_is_lost(monkeypatch):
    class Away(Cluster):
        async def tail_job_logs(self, job):
            raise ConnectionError("the tunnel is down")
            yield

    def press_ctrl_c(seconds):
        raise KeyboardInterrupt

    shown = []
    monkeypatch.setattr(submit.time, "sleep", press_ctrl_c)
    assert submit._follow(Away("RUNNING", None), "demo-1", shown.append) == 130
    assert shown[-1] == "no longer following demo-1; it continues"


def test_no_secret_of_the_environment_goes_along(tmp_path, monkeypatch):
    for name in ("MLFLOW_TRACKING_PASSWORD", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, "planted-7c1e")
    write_package(tmp_path / "sent", for_cluster(load_settings(preset="demo", overrides=SHARED)))
    assert [
        path for path in (tmp_path / "sent").rglob("*") if path.is_file() and b"planted-7c1e" in path.read_bytes()
    ] == []


@pytest.mark.parametrize("address", ["ray://127.0.0.1:10001", "127.0.0.1:8265", "auto"])
def test_an_address_that_is_no_dashboards_is_refused(address):
    with pytest.raises(SettingsError, match="such as http://127.0.0.1:8265"):
        submit_run(load_settings(preset="demo", overrides=SHARED), address=address)


class Cluster:
    """A job's output that is cut off once, and then its end."""

    def __init__(self, status, exit_code):
        self.tails, self.info = (
            [["begins\n", "step 1\n"], ["begins\n", "step 1\nstep 2\n", "ends\n"]],
            JobInfo(status, exit_code),
        )

    async def tail_job_logs(self, job):
        tail = self.tails.pop(0)
        for text in tail:
            yield text
        if self.tails:
            raise ConnectionError("the tunnel is gone")

    def get_job_info(self, job):
        return self.info


class JobInfo:
    def __init__(self, status, exit_code):
        from ray.job_submission import JobStatus

        self.status, self.driver_exit_code, self.message = JobStatus(status), exit_code, "the run's last words"


@pytest.mark.parametrize(
    ("status", "exit_code", "expected"),
    [("SUCCEEDED", 0, 0), ("FAILED", 1, 1), ("FAILED", 143, 143), ("STOPPED", None, 1)],
)
def test_a_job_is_followed_to_its_end_over_a_lost_connection_and_nothing_is_shown_twice(
    status, exit_code, expected, monkeypatch
):
    monkeypatch.setattr(submit, "_RETRY_S", 0.01)
    shown = []
    assert submit._follow(Cluster(status, exit_code), "demo-1", shown.append) == expected
    assert [line for line in "\n".join(shown).splitlines() if "connection" not in line][:4] == [
        "begins",
        "step 1",
        "step 2",
        "ends",
    ]
    assert (
        sum("the connection is lost (ConnectionError: the tunnel is gone); trying again" in line for line in shown) == 1
    )
    assert ("the run's last words" in shown[-1]) == (expected != 0)
