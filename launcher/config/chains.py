"""Chains from a question to its answer, as the paper compares them (arXiv:2302.00923, table 2).

    CHAINS["two-stage"].stages                  # (Stage("rationale", ...), Stage("answer", ...)): two trainings
    CHAINS["reason-then-answer"].stage_names    # ("answer",): one model generates rationale and answer in one text

A chain is a tuple of stages. A stage is one training, and what becomes of its model: it may write a text
for every question, which later stages read. The steps of a run follow from the chain. Vision, captions and
sizes are settings of the run and can be combined with any chain.
"""

from __future__ import annotations

import dataclasses

from mmcot.errors import InputError
from mmcot.texts.answers import split_reasons
from mmcot.texts.prompts import build_pair, split_format
from mmcot.texts.sample import Sample

PRETRAINED = "pretrained"
EVALUATE = "evaluate"
ANSWERS = "predictions"  # the text of the last stage, in the folder of the same name
GIVEN_FIELD = "rationale"  # of the lines of given texts
TEXT = "text"  # the objective of the published system: the cross-entropy of the target
MATCHING = "matching"  # BLIP-2's stage one: which pictures and texts belong together
TRAINED_PARTS = ("all", "bridge", "lora")
RATIONALE, ANSWER = "rationale", "answer"  # the stages of the published system, with settings sections of their own
MATCH = "match"
ALIGN = "align"
_TAKEN = {
    *("data", "steps", "logs", "lengths", "tune", "trials", "evaluations", "rank-token", "pipeline", "tuning"),
    *(EVALUATE, ANSWERS),
}


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training of a chain, and the text that its model writes.

    Attributes:
        name: of its folder in the run and of its settings.
        format: the default of its prompt format; its gold text is the format's target.
        objective: the loss, one of ``mmcot.models.loss.OBJECTIVES``.
        reads: texts of earlier stages, joined with spaces where the format has a G.
        starts_from: "pretrained", which is ``model.pretrained`` or random weights, or the name of an earlier stage
            whose trained model it continues.
        trains: "all" parameters, those of the "bridge" alone, or the bridge and "lora" adapters of the language model;
            a stage's own setting comes first.
        writes: the text that its model writes for every question, a folder of the run; None: none. The last stage
            writes ``ANSWERS``.
    """

    name: str
    format: str
    objective: str = TEXT
    reads: tuple[str, ...] = ()
    starts_from: str = PRETRAINED
    trains: str = "all"
    writes: str | None = None

    @property
    def step(self) -> str:
        """The step that trains it."""
        return f"train-{self.name}"


@dataclasses.dataclass(frozen=True)
class Chain:
    """The trainings of a run in their order; ``given`` names texts that are not written but given to the run.

    Raises:
        ValueError: a stage reads what no earlier stage writes, or starts from no earlier stage; the message names it.
    """

    name: str
    paper_name: str
    stages: tuple[Stage, ...]
    given: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.stages, Stage) or any(isinstance(stage.reads, str) for stage in self.stages):
            raise InputError(
                f"chain {self.name!r}: stages and what a stage reads are tuples; one alone is written with a comma: "
                '("notes",)'
            )
        known, names = list(self.given), []
        _check_names(self)
        for stage in self.stages:
            place = f"chain {self.name!r}, stage {stage.name!r}"
            if ("G" in split_format(stage.format)[0]) != bool(stage.reads):
                what = f"reads {_listed(list(stage.reads))}" if stage.reads else "reads no text"
                has = "no" if stage.reads else "a"
                raise InputError(
                    f"{place} {what}, and its format {stage.format!r} has {has} G, the place of the texts that are "
                    "read; give reads and a format with G, such as QCMG-A, or neither"
                )
            if missing := [text for text in stage.reads if text not in known]:
                raise InputError(
                    f"{place} reads {missing[0]!r}, which no earlier stage writes; there is {_listed(known)}"
                )
            if stage.starts_from not in (PRETRAINED, *names):
                raise InputError(
                    f"{place} starts from {stage.starts_from!r}; expected {PRETRAINED!r} or an earlier stage, of which "
                    f"there is {_listed(names)}"
                )
            if stage.trains not in TRAINED_PARTS:
                raise InputError(f"{place} trains {stage.trains!r}; expected one of {', '.join(TRAINED_PARTS)}")
            if stage.objective == MATCHING and (stage.trains != "bridge" or stage.writes):
                raise InputError(
                    f"{place} matches pictures and texts, which trains the bridge alone and writes no text; give "
                    "trains='bridge' and no writes"
                )
            if stage.writes is not None:
                if stage.writes in known or (stage.writes == ANSWERS) != (stage is self.stages[-1]):
                    raise InputError(
                        f"{place} writes {stage.writes!r}; expected a new name, and {ANSWERS!r} for the last "
                        "stage alone"
                    )
                known.append(stage.writes)
            names.append(stage.name)
        if not names:
            raise InputError(f"chain {self.name!r} has no stage; give one at least")

    @property
    def stage_names(self) -> tuple[str, ...]:
        """The names of the stages, in their order."""
        return tuple(stage.name for stage in self.stages)

    def stage(self, name: str) -> Stage:
        """Return a stage by its name.

        Raises:
            ValueError: the chain has no such stage.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise InputError(f"run.chain {self.name!r} has no stage {name!r}; it has {', '.join(self.stage_names)}")

    @property
    def answering(self) -> Stage | None:
        """The stage that answers: the last one, if it writes."""
        return self.stages[-1] if self.stages[-1].writes else None

    @property
    def writing(self) -> tuple[Stage, ...]:
        """The stages whose models are needed to answer a new question."""
        return tuple(stage for stage in self.stages if stage.writes)

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts that stages read or write before the answers, given ones first."""
        return (*self.given, *(stage.writes for stage in self.stages[:-1] if stage.writes))

    @property
    def steps(self) -> tuple[str, ...]:
        """The steps of a run: the data, given texts, then each training and the writing of its texts."""
        steps = ["data", *self.given]
        for stage in self.stages:
            steps.append(stage.step)
            if stage.writes and stage is not self.stages[-1]:
                steps.append(stage.writes)
        return (*steps, EVALUATE) if self.answering else tuple(steps)

    def stage_of_step(self, step: str) -> Stage | None:
        """Return the stage that a step trains; None if it trains none."""
        return next((stage for stage in self.stages if stage.step == step), None)

    def writer_of(self, text: str) -> Stage | None:
        """Return the stage that writes a text; None if it is given."""
        return next((stage for stage in self.stages if stage.writes == text), None)

    def field_of(self, text: str) -> str:
        """Return the key of a text in the lines of its files."""
        writer = self.writer_of(text)
        return writer.name if writer else GIVEN_FIELD

    @property
    def reads_rationales(self) -> bool:
        """Whether the answering model reads texts of another model, of this run or given."""
        return self.answering is not None and bool(self.answering.reads)

    def reasons(self, text: str, sample: Sample) -> str | None:
        """Return the rationale in the answering model's own text, or None where its format has none."""
        return split_reasons(text, is_free=sample.kind == "free") if self._answers_with_reasons else None

    def gold_reasons(self, sample: Sample, *, format: str) -> str | None:
        """Return the rationale in the gold target of ``format``, the answering model's own."""
        return self.reasons(build_pair(sample, format)[1], sample)

    @property
    def _answers_with_reasons(self) -> bool:
        if self.answering is None or self.answering.reads:
            return False
        output = split_format(self.answering.format)[1]
        return "A" in output and output != "A"


def _check_names(chain: Chain) -> None:
    """Check the names of stages and texts: each is a folder of the run."""
    if len(chain.given) > 1:
        raise InputError(f"chain {chain.name!r} is given {_listed(list(chain.given))}; one text can be given to a run")
    written = [stage.writes for stage in chain.stages if stage.writes]
    if written and written[-1] == ANSWERS:
        written.pop()
    folders = [*chain.given, *(stage.name for stage in chain.stages), *written]
    reserved = ("train-", f"{EVALUATE}-")
    for name in folders:
        is_taken = folders.count(name) > 1 or name in _TAKEN or name.startswith(reserved)
        if is_taken or not name.replace("-", "").isalnum():
            raise InputError(
                f"chain {chain.name!r}: {name!r} is no name for a stage or text, each of which is a folder of the run; "
                f"give letters, digits and '-', used once in the chain, and none of {', '.join(sorted(_TAKEN))}"
            )


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names)) or "none"


# By name; a plain dict, to which extensions add theirs.
CHAINS: dict[str, Chain] = {
    chain.name: chain
    for chain in (
        Chain(
            "two-stage",
            "QCM→R, QCMR→A",
            (
                Stage(RATIONALE, "QCM-E", writes="rationales"),
                Stage(ANSWER, "QCMG-A", reads=("rationales",), writes=ANSWERS),
            ),
        ),
        Chain(
            "given-rationales",
            "QCMR→A",
            (Stage(ANSWER, "QCMG-A", reads=("rationales",), writes=ANSWERS),),
            given=("rationales",),
        ),
        Chain("answer", "QCM→A", (Stage(ANSWER, "QCM-A", writes=ANSWERS),)),
        Chain("reason-then-answer", "QCM→RA", (Stage(ANSWER, "QCM-LEA", writes=ANSWERS),)),
        Chain("answer-then-explain", "QCM→AR", (Stage(ANSWER, "QCM-ALE", writes=ANSWERS),)),
        Chain(
            "match-first",
            "V↔C, QCM→RA",
            (
                Stage(MATCH, "V-C", objective=MATCHING, trains="bridge"),
                Stage(ANSWER, "QCM-EA", starts_from=MATCH, trains="bridge", writes=ANSWERS),
            ),
        ),
        Chain(
            "align-first",
            "V→C, QCM→RA",
            (
                Stage(ALIGN, "V-C", trains="bridge"),
                Stage(ANSWER, "QCM-EA", starts_from=ALIGN, writes=ANSWERS),
            ),
        ),
    )
}


def chain_named(name: str) -> Chain:
    """Return a chain by its name.

    Raises:
        ValueError: there is none; the message names those that exist.
    """
    if name not in CHAINS:
        raise InputError(f"chain {name!r} is unknown; expected one of {', '.join(CHAINS)}")
    return CHAINS[name]
