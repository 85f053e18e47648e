"""Chains from a question to its answer, as the paper compares them (arXiv:2302.00923, table 2).

    CHAINS["two-stage"].stages          # ("rationale", "answer"): two trainings
    CHAINS["reason-then-answer"].stages # ("answer",): one model generates rationale and answer in one text

The training of the answering model is always called ``answer``; that of a model which only
generates rationales is called ``rationale``. Vision, captions and sizes are settings of the run
and can be combined with any chain.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from mmcot.texts.answers import split_reasons
from mmcot.texts.prompts import build_pair, gold_rationale
from mmcot.texts.sample import Sample

STEPS = ("data", "train-rationale", "rationales", "train-answer", "evaluate")


@dataclasses.dataclass(frozen=True)
class Chain:
    """The trainings, and the format of the answering model."""

    name: str
    paper_name: str
    stages: tuple[str, ...]
    answer_format: str

    @property
    def has_rationale_stage(self) -> bool:
        """Whether a model that only reasons is trained first."""
        return "rationale" in self.stages

    @property
    def reads_rationales(self) -> bool:
        """Whether the answering model reads rationales of another model, of this run or given."""
        return self.has_rationale_stage or self.name == "given-rationales"

    @property
    def steps(self) -> tuple[str, ...]:
        """The steps of the chain, in the order of ``STEPS``."""
        left_out = (
            set()
            if self.has_rationale_stage
            else {"train-rationale"}
            if self.reads_rationales
            else {"train-rationale", "rationales"}
        )
        return tuple(step for step in STEPS if step not in left_out)

    def reasons(self, text: str) -> str | None:
        """Return the rationale in the answering model's text, or None where the text has none."""
        return None if self.reads_rationales or self.name == "answer" else split_reasons(text)

    def gold_reasons(self, problem: Sample, *, rationale_format: str, answer_format: str) -> str | None:
        """Return the reference of the rationale: the target of the training, without the answer."""
        if self.reads_rationales:
            return gold_rationale(problem, rationale_format)
        return self.reasons(build_pair(problem, answer_format)[1])


CHAINS: Mapping[str, Chain] = MappingProxyType(
    {
        chain.name: chain
        for chain in (
            Chain("two-stage", "QCM→R, QCMR→A", ("rationale", "answer"), "QCMG-A"),
            Chain("given-rationales", "QCMR→A", ("answer",), "QCMG-A"),
            Chain("answer", "QCM→A", ("answer",), "QCM-A"),
            Chain("reason-then-answer", "QCM→RA", ("answer",), "QCM-LEA"),
            Chain("answer-then-explain", "QCM→AR", ("answer",), "QCM-ALE"),
        )
    }
)
