"""Answering questions with a finished run, in this process, without Ray and MLflow.

The models compute in ``generation.precision``, as in the run's own generation and evaluation: on a GPU if the
run was started on GPUs and this process sees one that computes in this precision, else on the CPU. An answer:

    {"qid": "a1", "rationale": "Solution: ...", "answer_text": "The answer is (B).", "prediction": 1, "choice": "moon"}
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image

from data_shards.atomic_files import fingerprint
from data_shards.picture_features import Encode
from data_shards.sources.pictures import open_picture
from data_shards.text_lines import read_lines
from launcher.cluster.gpus import computes_on_gpu
from launcher.config.settings import Settings
from launcher.data.feature_tasks import open_encoder
from launcher.evaluation.predictions import PREDICTION, other_texts
from launcher.runs.exported import WEIGHTS, describe_export, verify_model
from launcher.runs.ownership import owner
from launcher.runs.run_dir import RunDir, RunError
from launcher.runs.run_settings import read_run_settings
from mmcot.decoding.answering import Prediction, StageModel, answer_questions
from mmcot.errors import InputError
from mmcot.models.device import DTYPES, has_precision, open_device
from mmcot.models.opening import open_model
from mmcot.texts.encoding import encode_marked, stack_features
from mmcot.texts.prompts import build_pair
from mmcot.texts.sample import Sample, SampleError
from mmcot.texts.text_ids import encode_text
from mmcot.texts.tokenizer import open_tokenizer

_FIRST_ANSWERS = 256  # of the test split, that tell how a run answers


class RunPredictor:
    """The models of a run, or of its ``stages`` alone; opened once, after the first questions are checked.

    Threads may use it at the same time, as those of a server do; one of them computes and the others wait.

    Args:
        report: gets a sentence where the models do not compute on this machine's GPU; None: standard error.

    Raises:
        RunError: the folder is no run, or its models are not trained yet or not those that were exported.
    """

    def __init__(
        self, folder: Path, *, stages: Sequence[str] | None = None, report: Callable[[str], None] | None = None
    ) -> None:
        self.settings = read_run_settings(folder)
        if self.settings.chain.given:
            raise RunError(
                f"{folder} answers over rationales that were given to it and cannot write its own; "
                "give a run of another chain"
            )
        if self.settings.chain.answering is None:
            raise RunError(f"the chain of {folder} has no stage that answers; give a run of another chain")
        self.num_cut = 0
        self._report = report or (lambda line: print(line, file=sys.stderr))
        self._lock = threading.Lock()
        stages = [stage.name for stage in self.settings.chain.writing] if stages is None else stages
        self._run_dir = RunDir(folder)
        self._folders = {stage: _trained(self._run_dir, stage) for stage in stages}
        self._encoder: Encode | None = None

    @cached_property
    def stages(self) -> dict[str, StageModel]:
        """The models by stage."""
        return {
            stage: _open_stage(self.settings, folder, stage, self.device) for stage, folder in self._folders.items()
        }

    @cached_property
    def device(self) -> torch.device:
        """Where the models and the encoder of pictures compute."""
        precision, use_gpu = self.settings.generation.precision, computes_on_gpu(self._run_dir)
        if use_gpu and not has_precision(torch.cuda.current_device(), precision):
            self._report(
                f"note: this machine's GPU ({torch.cuda.get_device_name()}) does not compute in {precision}, the run's "
                "generation.precision; the models compute on the CPU"
            )
            use_gpu = False
        return open_device(use_gpu=use_gpu, precision=precision)

    @cached_property
    def feature_shape(self) -> tuple[int, int]:
        """[P, V] of the features that the models take."""
        config = next(iter(self.stages.values())).model.config
        return config.vision_num_patches, config.vision_dim

    @property
    def answers_with_letters(self) -> bool:
        """Whether the run's first test answers are choices and no texts, so that it cannot answer freely."""
        path = self._run_dir.predictions / "test.jsonl"
        if not path.exists():  # of a registered bundle, or before the evaluation
            return False
        lines = read_lines(path, PREDICTION)[:_FIRST_ANSWERS]
        kinds = {type(line.get("prediction")) for line in lines}  # an answer that could not be read has none
        return int in kinds and str not in kinds

    def load(self) -> None:
        """Open the models now, so that the first question of a server does not wait for them."""
        with self._lock:
            _ = self.feature_shape

    def identity(self) -> dict[str, Any]:
        """What decides the answers: the sha256 of every model, and a fingerprint of how the models are used."""
        files = {name: describe_export(name, folder)["files"] for name, folder in self._folders.items()}
        own, data = self.settings, self.settings.data
        used = {
            "chain": [dataclasses.asdict(stage) for stage in own.chain.stages],
            "stages": {
                name: [stage.format, stage.max_source_tokens, stage.max_target_tokens]
                for name, stage in ((name, own.stage(name)) for name in self._folders)
            },
            "data": [data.use_caption, data.features, data.patch_sizes or data.vision_model, data.max_pictures],
            "precision": own.generation.precision,
            "files": files,
        }
        return {"models": {name: found[WEIGHTS] for name, found in files.items()}, "settings": fingerprint(used)}

    def answer(self, problems: Sequence[Sample], folder: Path) -> Iterator[dict[str, Any]]:
        """Answer questions; their pictures are in ``folder``.

        Raises:
            SampleError: a picture does not exist, or there are more than the run was trained with; raised before
                a model is opened.
        """
        for problem in problems:
            self.check_pictures(problem, folder)
        with self._lock:  # not while an answer is yielded: its reader may take any time
            answers = self._answer(problems, [self._features(problem, folder) for problem in problems])
        yield from answers

    def answer_or_errors(self, problems: Sequence[Sample], folder: Path) -> list[dict[str, Any] | InputError]:
        """Answer questions as ``answer``; the error of a question whose pictures cannot be used takes its place."""
        found: list[np.ndarray | InputError | None] = []
        with self._lock:
            for problem in problems:
                try:
                    self.check_pictures(problem, folder)
                    found.append(self._features(problem, folder))
                except InputError as error:
                    found.append(error)
            usable = [each for each in zip(problems, found, strict=True) if not isinstance(each[1], InputError)]
            answers = iter(self._answer([problem for problem, _ in usable], [cast(Any, each) for _, each in usable]))
        return [each if isinstance(each, InputError) else next(answers) for each in found]

    def _answer(self, problems: Sequence[Sample], features: Sequence[np.ndarray | None]) -> list[dict[str, Any]]:
        if not problems:
            return []
        predictions, num_cut = answer_questions(
            list(self.stages.values()), problems, features, feature_shape=self.feature_shape
        )
        self.num_cut += num_cut
        return [self._describe(*each) for each in zip(problems, predictions, strict=True)]

    def _describe(self, problem: Sample, prediction: Prediction) -> dict[str, Any]:
        index, chain = prediction.prediction, self.settings.chain
        return {
            "qid": prediction.qid,
            "rationale": prediction.rationale or chain.reasons(prediction.answer_text, problem) or "",
            "answer_text": prediction.answer_text,
            "prediction": index,
            "choice": problem.choices[index] if isinstance(index, int) else None,
            **other_texts(chain, prediction.texts),
        }

    def attention(self, problem: Sample, folder: Path) -> tuple[list[str], np.ndarray]:
        """Where the first stage looks while it reads a question: its prompt's tokens, and their attention to patches.

        Returns:
            the tokens, of a model with a resampler its media tokens, and float [tokens, patches] that sums to 1 over
            the patches.

        Raises:
            RunError: the run reads text alone, or its fusion has no attention maps.
        """
        with self._lock:
            return self._attention(problem, folder)

    def _attention(self, problem: Sample, folder: Path) -> tuple[list[str], np.ndarray]:
        stage, features = next(iter(self.stages.values())), self._features(problem, folder)
        if features is None:
            raise RunError("this run reads text alone: there is no attention to pictures")
        pictures = stage.model.config.picture_tokens
        marks = pictures is not None
        source, _ = build_pair(problem, stage.format, use_caption=stage.use_caption, marks_pictures=marks)
        encoded = encode_marked(stage.tokenizer, source, pictures) if marks else encode_text(stage.tokenizer, source)
        ids = torch.tensor([encoded[: stage.max_source_tokens]])
        inputs = stack_features([features], self.feature_shape)
        inputs["vision_features"] = inputs["vision_features"].to(stage.model.dtype)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **inputs}
        with torch.no_grad():
            maps = stage.model.attention_maps(**{name: tensor.to(self.device) for name, tensor in inputs.items()})
        if maps is None:
            raise RunError("the fusion or resampler of this run's model has no attention maps")
        if maps.of_media:
            tokens = [f"<image {number + 1}>" for number in range(maps.attention_BSP.shape[1])]
        else:
            tokens = cast("list[str]", stage.tokenizer.convert_ids_to_tokens(ids[0].tolist()))
        return tokens, maps.attention_BSP[0].float().cpu().numpy()

    def check_pictures(self, problem: Sample, folder: Path, *, read: bool = False) -> None:
        """Check that the pictures of a question can be used, without a model.

        Args:
            read: also open them; else only see that they exist.

        Raises:
            InputError: a picture does not exist or cannot be read, or there are more than the run was trained with.
        """
        if self.settings.data.features is None:
            return
        if len(problem.images) > self.settings.data.max_pictures:
            raise SampleError(
                f"question {problem.qid}: {len(problem.images)} pictures, the run was trained with at most "
                f"{self.settings.data.max_pictures}; give fewer"
            )
        for path in (folder / image for image in problem.images):
            if not os.path.isfile(path):  # a name of any length and characters
                raise SampleError(
                    f"question {problem.qid}: picture {path} does not exist; give an existing file, or none"
                )
            if read:
                _open_picture(problem, path)

    def _features(self, problem: Sample, folder: Path) -> np.ndarray | None:
        if self.settings.data.features is None:
            return None
        if not problem.images:
            return np.zeros((0, self.feature_shape[1]), dtype=np.float16)
        images = [_open_picture(problem, folder / name) for name in problem.images]
        return np.concatenate(list(self._encode(images)))

    def _encode(self, images: list[Image.Image]) -> np.ndarray:
        """Features of pictures, [B, P, D], of the kind the run was trained with; the encoder is opened once."""
        if self._encoder is None:
            encode, shape = open_encoder(self.settings.data, device=self.device.type)
            if (shape[0] * self.settings.data.max_pictures, shape[1]) != tuple(self.feature_shape):
                raise RunError(
                    f"this run was trained on {self.settings.data.features} features {list(self.feature_shape)} per "
                    f"question, the encoder gives {list(shape)} per picture; set data.vision_model in its run.yaml to "
                    "the encoder they were made with"
                )
            self._encoder = encode
        return self._encoder(images)


def _open_picture(problem: Sample, path: Path) -> Image.Image:
    name = f"question {problem.qid}: picture {path}"
    try:
        return open_picture(path, name=name)
    except OSError as error:
        raise SampleError(f"{name} cannot be read ({error.strerror}); give one that can, or none") from None


def format_answer(prediction: dict[str, Any]) -> str:
    """A prediction as human-readable text."""
    if isinstance(prediction["prediction"], str):
        answer = prediction["answer_text"]
    elif not prediction["answer_text"].strip():
        answer = "the model wrote an empty text"
    elif prediction["choice"] is None:
        answer = f"no answer could be read from {prediction['answer_text']!r}"
    else:
        answer = f"{prediction['answer_text']}  {prediction['choice']}"
    return f"{prediction['rationale']}\n{answer}"


def to_json_line(prediction: dict[str, Any]) -> str:
    """A prediction as a line of JSONL."""
    return json.dumps(prediction, ensure_ascii=False)


def _trained(run_dir: RunDir, stage: str) -> Path:
    folder = run_dir.model(stage)
    if not (folder / "config.json").exists():
        what = f"it is running, see `mmcot status {run_dir.path}`" if owner(run_dir) else "run `mmcot run` to its end"
        raise RunError(f"{folder} does not exist: stage {stage!r} is not trained yet; {what}")
    return folder


def _open_stage(settings: Settings, folder: Path, stage: str, device: torch.device) -> StageModel:
    verify_model(folder)
    spec, own = settings.stage(stage), settings.chain.stage(stage)
    model = open_model(folder, dtype=DTYPES[settings.generation.precision]).eval()
    model.to(device)  # pyright: ignore[reportArgumentType], transformers' wrapper hides Module.to
    return StageModel(
        model=model,
        tokenizer=open_tokenizer(folder),
        format=spec.format,
        use_caption=settings.data.use_caption,
        max_source_tokens=spec.max_source_tokens,
        max_target_tokens=spec.max_target_tokens,
        reads=own.reads,
        writes=None if own is settings.chain.answering else own.writes,
    )
