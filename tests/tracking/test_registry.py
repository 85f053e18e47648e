"""Finished models in MLflow's registry: what they hold, what they are linked to, who gets the alias."""

from __future__ import annotations

import base64
import io

import numpy as np
import pandas
import pytest
from PIL import Image

from data_shards.atomic_files import commit_bytes, read_json
from launcher.config.loading import dump_settings, tracking_uri
from launcher.runs.run_dir import RunDir
from launcher.tracking.run_log import open_tracker


@pytest.fixture(scope="module")
def register(tmp_path_factory, model_dir, tiny_settings):
    """A function that registers a pair of models from a run of its own, and the client to look with."""
    folder = tmp_path_factory.mktemp("registry")

    def register(name, accuracy, data="data-1"):
        settings = tiny_settings.model_copy(
            update={"run": tiny_settings.run.model_copy(update={"dir": str(folder / "runs" / name)})}
        )
        run_dir = RunDir(settings.run_dir)
        commit_bytes(run_dir.path / "run.yaml", dump_settings(settings).encode())
        for stage in ("rationale", "answer"):
            run_dir.model(stage).parent.mkdir(parents=True, exist_ok=True)
            if not run_dir.model(stage).exists():
                run_dir.model(stage).symlink_to(model_dir)
        with open_tracker(settings, run_dir) as tracker:
            with tracker.step("train-rationale") as child:
                child.log_model(
                    name="rationale",
                    stages=["rationale"],
                    alias="candidate",
                    accuracy=None,
                    data=data,
                    tags={"mmcot.model_sha256": "abc"},
                )
            tracker.parent.log_model(
                name="answer",
                stages=["rationale", "answer"],
                alias="champion",
                accuracy=accuracy,
                data=data,
                tags={"mmcot.rationales": "r1"},
            )
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri(settings)), read_json(run_dir.mlflow_state)["runs"]

    return register


def test_the_champion_changes_only_for_a_better_one_on_the_same_data(register):
    client, first = register("first", 60.0)
    champion = client.get_model_version_by_alias("answer", "champion")
    assert champion.run_id == first["pipeline"] and champion.tags["mmcot.validation_accuracy"] == "60.0000"
    rationale = client.get_model_version_by_alias("rationale", "candidate")
    assert rationale.run_id == first["train-rationale"]
    assert (
        champion.tags["mmcot.rationale_version"] == str(rationale.version) and champion.tags["mmcot.rationales"] == "r1"
    )
    _, worse = register("worse", 50.0)
    _, elsewhere = register("elsewhere", 99.0, data="other-data")
    assert client.get_model_version_by_alias("answer", "champion-other-da").run_id == elsewhere["pipeline"]
    assert client.get_model_version_by_alias("answer", "champion").run_id == first["pipeline"]
    assert client.get_model_version_by_alias("rationale", "candidate").run_id not in (
        first["train-rationale"],
        worse["train-rationale"],
    )
    _, better = register("better", 70.0)
    assert client.get_model_version_by_alias("answer", "champion").run_id == better["pipeline"]
    register("better", 70.0)  # the same run again makes no other version
    newest = client.get_model_version_by_alias("rationale", "candidate").version
    register("first", 60.0)  # told again, much later: the newest stays
    assert client.get_model_version_by_alias("rationale", "candidate").version == newest
    assert len(client.search_model_versions("name = 'answer'")) == 4


def test_the_registered_pair_answers_a_question_with_a_picture_as_predict_does(register, monkeypatch):
    import mlflow

    client, _ = register("loaded", 80.0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", client.tracking_uri)
    mlflow.set_tracking_uri(client.tracking_uri)
    try:
        model = mlflow.pyfunc.load_model("models:/answer@champion")
        writer = mlflow.pyfunc.load_model("models:/rationale@candidate")
    finally:
        mlflow.set_tracking_uri(None)
    picture = io.BytesIO()
    Image.fromarray(np.zeros((64, 64, 3), dtype=np.uint8)).save(picture, "PNG")
    rows = [
        {
            "question": "Will these magnets attract?",
            "choices": ["attract", "repel"],
            "image_base64": base64.b64encode(picture.getvalue()).decode(),
        },
        {"qid": "b", "question": "Which is bigger?", "choices": ["sun", "moon"], "context": "Look up."},
    ]
    answers = model.predict(rows)
    assert [answer["qid"] for answer in answers] == ["0", "b"] and set(answers[0]) >= {
        "rationale",
        "answer_text",
        "prediction",
    }
    assert [answer["rationale"] for answer in model.predict(pandas.DataFrame(rows))] == [
        answer["rationale"] for answer in answers
    ]
    assert [row["rationale"] for row in writer.predict(rows)] == [answer["rationale"] for answer in answers]
    assert not [
        path
        for path in client.list_artifacts(client.get_model_version_by_alias("answer", "champion").run_id, "model")
        if path.path.endswith(".pkl")
    ]


def test_a_registry_that_does_not_answer_gives_no_alias_away():
    from mlflow.exceptions import MlflowException

    from launcher.tracking.registry import _current

    class Away:
        def get_model_version_by_alias(self, name, alias):
            raise MlflowException("API request failed with exception timeout")

    with pytest.raises(MlflowException, match="timeout"):
        _current(Away(), "answer", "champion")
