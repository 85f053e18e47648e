"""What MLflow shows as the description of each run, in Markdown."""

from __future__ import annotations

from launcher.config.chains import EVALUATE, PRETRAINED
from launcher.config.settings import Settings
from launcher.runs.records import read_hand_over
from launcher.runs.run_dir import RunDir

TAG = "mlflow.note.content"


def describe_parent(settings: Settings, run_dir: RunDir) -> dict[str, str]:
    """The description of a whole run, as a tag."""
    chain = settings.chain
    steps = "\n".join(f"{number}. `{step}`" for number, step in enumerate(chain.steps, start=1))
    losses = ", ".join(f"`{stage}_loss`" for stage in chain.stage_names)
    given = read_hand_over(run_dir.handed_over)
    tags = {f"handed_over.{name}": str(given[name]) for name in ("trial", "step")} if given else {}
    begun = f"{given['note']}.\n\n" if given else ""
    return tags | _tag(
        f"{begun}The run `{run_dir.path}`: chain **{settings.run.chain}** ({chain.paper_name}). Each step is a child "
        f"run:\n\n{steps}\n\nThis run has all settings as parameters, the losses of every training ({losses} and their "
        "validation losses) and the scores of both splits, so runs can be compared by it alone. The artifact "
        "`report.html` shows questions, curves and attention; `run.yaml` are the settings.\n\n"
        f"Continue or repeat it: `mmcot run --config run.yaml --set run.dir={run_dir.path}`"
    )


def describe_step(settings: Settings, step: str) -> dict[str, str]:
    """The description of a step's run, as a tag."""
    chain = settings.chain
    if stage := chain.stage_of_step(step):
        reads = f", with the {' and '.join(stage.reads)} written before" if stage.reads else ""
        start = (
            (settings.model.pretrained or "random weights")
            if stage.starts_from == PRETRAINED
            else f"the model of {stage.starts_from}"
        )
        text = (
            f"Trains stage **{stage.name}** (prompt format {settings.stage(stage.name).format}{reads}) from {start}. "
            "`loss` is the mean cross-entropy of the target tokens of a global batch, `validation_loss` that of the "
            "validation split; `goodput`, `padding_factor`, `mfu` and the times are explained in docs/glossary.md."
        )
    elif stage := chain.writer_of(step):
        text = f"Writes the {step} of all questions with the model of stage **{stage.name}**, each task once."
    elif step.startswith(EVALUATE):
        text = (
            "Answers questions with the last stage's model and scores them: accuracy by ScienceQA's nine classes, "
            "metrics of the rationales and of free answers, and the share of answers that could not be read."
        )
    elif step == "data":
        text = "Opens or builds the shards: texts, vision features, and a tokenizer where none is pretrained."
    else:
        text = f"Copies the {step} that were given to the run, after each file is verified."
    return _tag(text)


def describe_tuning(settings: Settings) -> dict[str, str]:
    """The description of a tuning's run, as a tag."""
    tuning = settings.tuning
    space = "\n".join(f"- `{name}`: {spec}" for name, spec in tuning.space.items())
    return _tag(
        f"A search for the best {tuning.objective} with Ray Tune ({tuning.scheduler}, {tuning.search}). Each trial is "
        f"a child run with its own parameters and metrics. Select them and choose Compare for parallel coordinates.\n\n"
        f"Searched:\n\n{space or '- the arms alone'}"
    )


def _tag(text: str) -> dict[str, str]:
    return {TAG: text}
