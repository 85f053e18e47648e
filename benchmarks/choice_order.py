"""Does a run's model read the choices, or did it learn letters? Its test questions again with their choices changed.

    python benchmarks/choice_order.py runs/demo [--seed 0] [--split test] [--limit 200]

Answers every question as given, with its choices reversed and rotated, and with one distractor replaced by another
skill's, removed (of three or more) or added (to fewer than four). Prints accuracy by column, stores it in the run's
choice_order.json and writes the run's report again, which shows it next to the scores.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from typing import Any

import torch

from data_shards.atomic_files import commit_json
from data_shards.reader import SplitReader
from launcher.evaluation.predictions import read_problems
from launcher.evaluation.tables import format_table
from launcher.generation.predictor import RunPredictor
from launcher.report.render import write_report
from launcher.runs.run_dir import RunDir, shards_dir_of
from mmcot.decoding.answering import answer_questions
from mmcot.metrics.metrics import accuracy_table
from mmcot.texts.choice_orders import CHANGES, change_choices


def measure(folder: Path, *, split: str, seed: int, limit: int | None, batch_size: int = 64) -> dict[str, Any]:
    """Accuracy of every change, in percent by column."""
    torch.set_num_threads(1)  # steps of a small model are too short for several threads
    predictor = RunPredictor(folder)
    shards_dir, features_name = shards_dir_of(RunDir(folder)), predictor.settings.data.features
    problems = list(read_problems(shards_dir, split).values())[:limit]
    reader = SplitReader(Path(shards_dir), split, features=features_name)
    features = {
        reader.qid(sample): reader.features(sample) if features_name else None for sample in range(len(problems))
    }
    choices_of: dict[str, set[str]] = {}
    for problem in problems:
        choices_of.setdefault(problem.skill, set()).update(problem.choices)
    result: dict[str, Any] = {"split": split, "seed": seed, "num_questions": {}, "accuracy": {}}
    for change in CHANGES:
        changed_of = {}
        for problem in problems:
            others = sorted(set().union(*(own for skill, own in choices_of.items() if skill != problem.skill)))
            changed = change_choices(
                problem, change, rng=random.Random(f"{seed}-{change}-{problem.qid}"), others=others
            )
            if changed is not None:
                changed_of[problem.qid] = changed
        if not changed_of:
            continue
        started = time.perf_counter()
        predictions, _ = answer_questions(
            list(predictor.stages.values()),
            list(changed_of.values()),
            [features[qid] for qid in changed_of],
            feature_shape=predictor.feature_shape,
            batch_size=batch_size,
        )
        result["num_questions"][change] = len(changed_of)
        result["accuracy"][change] = accuracy_table(
            list(changed_of.values()), {prediction.qid: prediction.prediction for prediction in predictions}
        )
        print(
            f"{change}: {len(changed_of):,} questions, AVG {result['accuracy'][change]['AVG']:.2f}, "
            f"{time.perf_counter() - started:.0f} s",
            flush=True,
        )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--split", default="test")
    parser.add_argument("--seed", type=int, default=0, help="of the draws of distractors")
    parser.add_argument("--limit", type=int, default=None, help="use only the first questions")
    options = parser.parse_args()
    result = measure(options.run, split=options.split, seed=options.seed, limit=options.limit)
    print(
        format_table(
            {
                f"{change}, {result['num_questions'][change]:,} questions": row
                for change, row in result["accuracy"].items()
            }
        )
    )
    commit_json(options.run / "choice_order.json", result)
    write_report([options.run], RunDir(options.run).report)


if __name__ == "__main__":
    main()
