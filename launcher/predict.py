"""Answering a person's questions with a finished run, in this process: no Ray, no MLflow.

A line of ``--input`` is a row as for own data (``data_shards/tables.py``), its answer not
needed; a line of output:

    {"qid": "a1", "rationale": "Solution: ...", "answer_text": "The answer is (B).", "prediction": 1, "choice": "moon"}
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from transformers import AutoTokenizer

from data_shards.features import Encode
from data_shards.pictures import open_picture
from data_shards.tables import read_rows, row_to_record
from launcher.config import parse_settings
from launcher.exported import verify_model
from launcher.features import open_encoder
from launcher.run_dir import RunDir, RunError
from launcher.settings import Settings
from mmcot.device import open_device
from mmcot.model import T5ForMultimodalGeneration
from mmcot.predict import StageModel, answer_questions
from mmcot.problem import Problem, ProblemError

BULK_SIZE = 256  # questions in memory at once


class RunPredictor:
    """The models of a run, opened once; or those ``stages`` of them alone.

    Raises:
        RunError: the folder is no run, or its models are not trained yet or not those that were exported.
    """

    def __init__(self, folder: Path, *, stages: Sequence[str] | None = None) -> None:
        if not (folder / "run.yaml").exists():
            raise RunError(f"{folder} holds no run (no run.yaml); give the folder of a finished one, such as runs/demo")
        self.settings = parse_settings(yaml.safe_load((folder / "run.yaml").read_text(encoding="utf-8")))
        if self.settings.run.chain == "given-rationales":
            raise RunError(f"{folder} answers over rationales that were given to it and cannot write its own; give a run of another chain")
        self.num_cut = 0
        stages = self.settings.chain.stages if stages is None else stages
        self.stages = {stage: _open_stage(self.settings, RunDir(folder), stage) for stage in stages}
        config = next(iter(self.stages.values())).model.config
        self.feature_shape = (config.vision_num_patches, config.vision_dim)
        self._encoder: Encode | None = None

    def answer(self, problems: Sequence[Problem], folder: Path) -> Iterator[dict[str, Any]]:
        """Answer questions whose pictures lie in ``folder``."""
        features = [self._features(problem, folder) for problem in problems]
        predictions, num_cut = answer_questions(
            self.stages.get("rationale"), self.stages.get("answer"), problems, features, feature_shape=self.feature_shape
        )
        self.num_cut += num_cut
        for problem, prediction in zip(problems, predictions, strict=True):
            choice = None if prediction.prediction is None else problem.choices[prediction.prediction]
            yield {
                "qid": prediction.qid, "rationale": prediction.rationale or self.settings.chain.reasons(prediction.answer_text) or "", "answer_text": prediction.answer_text,
                "prediction": prediction.prediction, "choice": choice,
            }  # fmt: skip

    def _features(self, problem: Problem, folder: Path) -> np.ndarray | None:
        name = self.settings.data.features
        if name is None:
            return None
        if len(problem.images) > self.settings.data.max_pictures:
            raise ProblemError(
                f"question {problem.qid}: {len(problem.images)} pictures, the run was trained with at most "
                f"{self.settings.data.max_pictures}; give fewer"
            )
        paths = [folder / image for image in problem.images]
        for path in paths:
            if not path.is_file():
                raise ProblemError(f"question {problem.qid}: picture {path} does not exist; give one that does, or none")
        if not paths:
            return np.zeros((0, self.feature_shape[1]), dtype=np.float16)
        images = [open_picture(path, name=f"question {problem.qid}: picture {path}") for path in paths]
        return np.concatenate(list(self._encode(images)))

    def _encode(self, images: list[Image.Image]) -> np.ndarray:
        """Features of pictures, [B, P, D], of the sort the run was trained with; the encoder is opened once."""
        if self._encoder is None:
            encode, shape = open_encoder(self.settings.data)
            if (shape[0] * self.settings.data.max_pictures, shape[1]) != tuple(self.feature_shape):
                raise RunError(
                    f"this run was trained on {self.settings.data.features} features {list(self.feature_shape)} of a question, the encoder gives "
                    f"{list(shape)} of a picture; set data.vision_model in its run.yaml to the encoder they were made with"
                )
            self._encoder = encode
        return self._encoder(images)


def read_input(path: Path) -> Iterator[list[Problem]]:
    """Read questions in bulks; their answers may be missing.

    Raises:
        ProblemError: a row cannot be used; file and line are named.
    """
    bulk: list[Problem] = []
    for line, row in read_rows(path):
        try:
            record = {"answer": None, **row_to_record(row)}
            bulk.append(Problem.from_scienceqa(str(row.get("qid", line)), record))
        except ProblemError as error:
            raise ProblemError(f"{path}, line {line}: {error}") from None
        if len(bulk) == BULK_SIZE:
            yield bulk
            bulk = []
    if bulk:
        yield bulk


def format_answer(prediction: dict[str, Any]) -> str:
    """A prediction for a person."""
    if prediction["choice"] is None:
        said = f"no answer could be read from {prediction['answer_text']!r}"
    else:
        said = f"{prediction['answer_text']}  {prediction['choice']}"
    return f"{prediction['rationale']}\n{said}"


def to_json_line(prediction: dict[str, Any]) -> str:
    """A prediction as a line of JSONL."""
    return json.dumps(prediction, ensure_ascii=False)


def _open_stage(settings: Settings, run_dir: RunDir, stage: str) -> StageModel:
    folder = run_dir.model(stage)
    if not (folder / "config.json").exists():
        raise RunError(f"{folder} does not exist: stage {stage!r} is not trained yet; run `mmcot run` to its end")
    verify_model(folder)
    spec = getattr(settings, stage)
    return StageModel(
        model=T5ForMultimodalGeneration.from_pretrained(folder).eval().to(open_device(use_gpu=False)),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        format=spec.format, use_caption=settings.data.use_caption,
        max_source_tokens=spec.max_source_tokens, max_target_tokens=spec.max_target_tokens,
    )  # fmt: skip
