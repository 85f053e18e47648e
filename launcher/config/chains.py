"""Ways from a question to its answer, as the paper compares them (arXiv:2302.00923, table 2).

    CHAINS["two-stage"].stages          # ("rationale", "answer"): each is a training of its own
    CHAINS["reason-then-answer"].stages # ("answer",): one model writes the reasons and the answer in one text

The training that answers is always called ``answer``; where there is one that only reasons,
it is ``rationale``. Vision, captions and sizes are settings of the run and go with any chain.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from mmcot.texts.answers import split_reasons
from mmcot.texts.problem import Problem
from mmcot.texts.prompts import build_pair, gold_rationale

STEPS = ("data", "train-rationale", "rationales", "train-answer", "evaluate")


@dataclasses.dataclass(frozen=True)
class Chain:
    """What is trained, and what the answering model reads and writes."""

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
        """Whether the answering model reads what another model wrote, of this run or given."""
        return self.has_rationale_stage or self.name == "given-rationales"

    @property
    def steps(self) -> tuple[str, ...]:
        """Those of all ``STEPS`` that the chain takes."""
        left_out = (
            set()
            if self.has_rationale_stage
            else {"train-rationale"}
            if self.reads_rationales
            else {"train-rationale", "rationales"}
        )
        return tuple(step for step in STEPS if step not in left_out)

    def reasons(self, text: str) -> str | None:
        """The reasons within what the answering model wrote, or None where it gives none."""
        return None if self.reads_rationales or self.name == "answer" else split_reasons(text)

    def gold_reasons(self, problem: Problem, *, rationale_format: str, answer_format: str) -> str | None:
        """What the reasons are held against: the target the model has learned, without the answer."""
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
