"""A run's models as MLflow loads them (``mlflow.pyfunc``, models from code): no pickle.

A question is a row as for ``mmcot predict``: ``question``, ``choices``, and optionally ``context``
and ``image`` (a path on the machine that predicts) or ``image_base64``.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import pandas
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel


class RunModel(PythonModel):
    """Answers questions, or writes their rationales if the bundle holds only stage one."""

    def load_context(self, context: Any) -> None:
        """Open the models of the bundle."""
        from launcher.generation.predictor import RunPredictor
        from launcher.runs.run_settings import read_run_settings

        folder = Path(context.artifacts["run"])
        names = read_run_settings(folder).chain.stage_names
        self.predictor = RunPredictor(folder, stages=[stage for stage in names if (folder / stage).exists()])
        self.predictor.load()

    def predict(
        self, context: Any, model_input: pandas.DataFrame, params: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """Answer the rows of a data frame, or of a list (MLflow has no type hint for both, and warns without one)."""
        rows = model_input.to_dict("records") if hasattr(model_input, "to_dict") else list(model_input)
        rows = [{name: value for name, value in row.items() if not _is_missing(value)} for row in rows]
        with tempfile.TemporaryDirectory() as folder:
            problems = [_problem(row, number, Path(folder)) for number, row in enumerate(rows)]
            return list(self.predictor.answer(problems, Path(folder)))


def _is_missing(value: Any) -> bool:
    """Whether a value is None, or the NaN of a data frame for a missing value."""
    return value is None or (isinstance(value, float) and value != value)


def _problem(row: dict[str, Any], number: int, folder: Path) -> Any:
    from data_shards.sources.row_samples import sample_of_row

    images: tuple[str, ...] = ()
    if data := row.get("image_base64"):
        (folder / f"{number}.image").write_bytes(base64.b64decode(data))
        images = (f"{number}.image",)
    elif path := row.get("image"):
        images = (str(Path(path).absolute()),)
    row = {name: row[name] for name in row if name not in ("image", "image_base64", "answer", "answers")}
    row |= {"image": "picture"} if images else {}  # replaced below: a path of this machine is allowed here
    for name in ("choices", "document"):
        if isinstance(row.get(name), str):
            row[name] = json.loads(row[name])
        elif hasattr(row.get(name), "tolist"):  # an array of a data frame
            row[name] = row[name].tolist()
    sample = sample_of_row(str(row.get("qid") or number), row, to_predict=True)
    return sample if sample.kind == "document" else dataclasses.replace(sample, images=images)


set_model(RunModel())
