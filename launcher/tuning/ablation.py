"""An ablation: a tuning over named arms and seeds, and one table of the scores of each arm.

    run_ablation(load_settings(preset="ablation"))      # `mmcot ablate`; run again to resume

``tuning.arms`` names settings that belong together (a chain, its formats and steps, vision or
none); every arm runs once for each seed of ``tuning.space``. ``ablation.md`` and
``ablation.png`` hold the mean and spread over seeds on the test split, the ceilings of MiniSQA
and what the paper reports for the same comparison on ScienceQA.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_shards.atomic_files import commit_bytes, read_json
from launcher.config.settings import Settings, SettingsError
from launcher.evaluation.predictions import read_problems
from launcher.evaluation.tables import ceiling_rows
from launcher.runs.run_dir import RunDir, shards_dir_of
from launcher.tracking.run_log import Tracker
from launcher.tuning.results import log_outcome
from launcher.tuning.space import with_values
from launcher.tuning.tune import Report, run_tuning

# Accuracy and ROUGE-L on ScienceQA's test split, arXiv:2302.00923, its later version (Flan-Alpaca base, ViT features).
PAPER = {
    ("answer", "text"): (81.63, None),
    ("reason-then-answer", "text"): (69.32, None),
    ("answer-then-explain", "text"): (69.68, None),
    ("two-stage", "text"): (78.57, 90.73),
    ("two-stage", "captions"): (79.37, None),
    ("two-stage", "vision"): (85.31, 93.46),
}
COLUMNS = ("AVG", "IMG", "NO")
_OTHER_PICTURES = "other pictures"  # a column where an arm has generation.other_pictures


def run_ablation(settings: Settings, *, report: Report = print, adopt: bool = False) -> RunDir:
    """Run every arm with every seed, and write the table.

    Raises:
        SettingsError: there are no arms, or the settings would end trials early.
    """
    if not settings.tuning.arms:
        raise SettingsError("tuning.arms is empty; give the arms to compare, as the preset 'ablation' does")
    if settings.tuning.scheduler != "none" or settings.tuning.stage != "pipeline":
        raise SettingsError("an ablation runs every arm to its end: tuning.scheduler=none, tuning.stage=pipeline")
    return run_tuning(settings, kind="arms", report=report, finish=_finish, adopt=adopt)


def _finish(
    settings: Settings, run_dir: RunDir, trials: list[dict[str, Any]], tracker: Tracker, report: Report
) -> None:
    rows, ceilings = summarize(settings, run_dir, trials), ceilings_of(settings, run_dir, trials)
    lines = format_rows(rows, ceilings)
    for trial in trials:
        if trial["error"]:
            lines.append(f"- {trial['values']['arm']}, seed {trial['values'].get('run.seed')} failed: {trial['error']}")
    for line in lines:
        report(line)
    commit_bytes(run_dir.path / "ablation.md", ("\n".join(lines) + "\n").encode())
    _plot(rows, ceilings, run_dir.path / "ablation.png")
    for name in ("ablation.md", "ablation.png"):
        tracker.parent.log_artifact(run_dir.path / name)
    reached = {}
    for row in rows:
        key = "".join(character if character.isalnum() else "_" for character in row["arm"])
        reached |= {f"{key}/AVG": _mean(row["AVG"]), f"{key}/rougeL": _mean(row["rougeL"])}
    log_outcome(run_dir, trials, reached)


def summarize(settings: Settings, run_dir: RunDir, trials: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per arm, in the arms' order: its test scores over the seeds, and the paper's."""
    rows = []
    for arm in settings.tuning.arms:
        own = with_values(settings, {"arm": arm})
        is_published = own.model.inject == "encoder"
        vision = "vision" if own.data.features else "captions" if own.data.use_caption else "text"
        done = [
            trial
            for trial in trials
            if trial["values"]["arm"] == arm
            and RunDir(run_dir.path / "trials" / trial["trial"]).scores("test").exists()
        ]
        scores = [read_json(RunDir(run_dir.path / "trials" / trial["trial"]).scores("test")) for trial in done]
        rows.append(
            {
                "arm": arm,
                "seeds": len(scores),
                "steps": _steps(own),
                "paper": PAPER.get((own.run.chain, vision), (None, None)) if is_published else (None, None),
                **{
                    column: [score["accuracy"][column] for score in scores if score["accuracy"][column] is not None]
                    for column in COLUMNS
                },
                "rougeL": [
                    score["rationale"]["rougeL"] for score in scores if score["rationale"]["rougeL"] is not None
                ],
                "unread": [score["parse_failure_rate"] for score in scores],
                _OTHER_PICTURES: _with_other_pictures(run_dir, done) if own.generation.other_pictures else [],
            }
        )
    return rows


def _with_other_pictures(run_dir: RunDir, trials: list[dict[str, Any]]) -> list[float]:
    """The accuracy of each trial with the pictures of other questions."""
    folders = (RunDir(run_dir.path / "trials" / trial["trial"]) for trial in trials)
    scores = (read_json(folder.scores_with_other_pictures) for folder in folders)
    return [score["accuracy"]["AVG"] for score in scores]


def ceilings_of(
    settings: Settings, run_dir: RunDir, trials: list[dict[str, Any]]
) -> dict[str, dict[str, float | None]]:
    """The best possible scores from the text alone, if the data set contains them."""
    for trial in trials:
        owner = RunDir(run_dir.path / "trials" / trial["trial"])
        if owner.marker("data"):
            folder = Path(shards_dir_of(owner))
            return ceiling_rows(read_problems(folder, "test"), read_json(folder / "text" / "manifest.json")["ceilings"])
    return {}


def format_rows(rows: list[dict[str, Any]], ceilings: dict[str, dict[str, float | None]]) -> list[str]:
    """The table in Markdown; what the paper reports, and the pictures of others, where an arm has them."""
    titles = {"AVG": "AVG", "IMG": "image questions", "NO": "no context", "rougeL": "ROUGE-L", "unread": "not read, %"}
    if any(row[_OTHER_PICTURES] for row in rows):
        titles[_OTHER_PICTURES] = "with other questions' pictures"
    has_paper = any(value is not None for row in rows for value in row["paper"])
    last = ["paper: AVG / ROUGE-L"] if has_paper else []
    heads = ["arm", "steps", "seeds", *titles.values(), *last]
    lines = [_line(heads), _line(["---"] * len(heads)).replace(" ", "")]
    for row in rows:
        paper = [" / ".join("-" if value is None else f"{value:.2f}" for value in row["paper"])] if has_paper else []
        lines.append(_line([row["arm"], row["steps"], row["seeds"], *(_spread(row[name]) for name in titles), *paper]))
    for name, columns in ceilings.items():
        cells = ["-" if columns[column] is None else f"{columns[column]:.2f}" for column in COLUMNS]
        lines.append(_line([name, "", "", *cells, *[""] * (len(heads) - 3 - len(cells))]))
    return lines


def _line(cells: Sequence[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _steps(settings: Settings) -> str:
    stages = [settings.stage(stage) for stage in settings.chain.stage_names]
    return " + ".join(f"{stage.num_steps:,}" if stage.num_steps else f"{stage.num_epochs:g} epochs" for stage in stages)


def _spread(values: list[float]) -> str:
    if not values:
        return "-"
    return f"{_mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def _mean(values: list[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _plot(rows: list[dict[str, Any]], ceilings: dict[str, dict[str, float | None]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 0.6 * len(rows) + 1.5), layout="constrained")
    for place, row in enumerate(reversed(rows)):
        axes.barh(place, _mean(row["AVG"]) or 0, color="tab:blue", alpha=0.35)
        axes.plot(row["AVG"], [place] * len(row["AVG"]), "o", color="tab:blue", alpha=0.7)
        axes.text(1, place, _spread(row["AVG"]), va="center", fontsize=9)
    for style, (name, columns) in zip(("--", ":"), ceilings.items(), strict=False):
        if columns["AVG"] is not None:
            axes.axvline(columns["AVG"], color="tab:red", linestyle=style, linewidth=1.2, label=name)
    axes.set_yticks(range(len(rows)), [row["arm"] for row in reversed(rows)])
    axes.set_xlim(0, 101)
    axes.set_xlabel("test accuracy: mean ± standard deviation, a dot a seed")
    if ceilings:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=2, frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
