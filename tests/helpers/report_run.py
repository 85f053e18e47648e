"""A run's folder made by hand, for the tests of the report: no Ray, no training."""

from __future__ import annotations

import json
import shutil

from data_shards.atomic_files import commit_json, sha256_of_file
from data_shards.generated_texts import (
    close_output,
    list_tasks,
    open_output,
    write_task,
)
from launcher.config.loading import dump_settings
from launcher.evaluation.predictions import read_problems, score
from launcher.runs.journal import Journal
from launcher.runs.run_dir import RunDir
from mmcot.texts.prompts import gold_rationale


def write_run(
    folder,
    settings,
    data,
    *,
    until="evaluate",
    wrong=4,
    model_dir=None,
    spoil=lambda text: text.replace("the", "a"),
    agreements=(),
):
    """A run's folder by hand: every ``wrong``-th answer is wrong, the first test answer cannot be read.

    The answers have these ``agreements`` in turn, if any are given, and the rationales half as much.
    """
    run_dir = RunDir(folder)
    steps = ("data", "train-rationale", "rationales", "train-answer", "evaluate")
    folder.mkdir(parents=True)
    (folder / "run.yaml").write_text(dump_settings(settings), encoding="utf-8")
    commit_json(folder / "lock.json", {"attempt": 1, "heartbeat": 1_790_000_100.0})
    done = steps[: steps.index(until) + 1]
    for seconds, step in enumerate(done, start=2):
        outputs = {"shards_dir": str(data.path)} if step == "data" else {}
        run_dir.mark_done(
            step,
            {
                "step": step,
                "inputs": {},
                "outputs": outputs,
                "attempt": 1,
                "mlflow_run_id": None,
                "seconds": float(seconds),
            },
        )
    for stage in ("rationale", "answer"):
        if f"train-{stage}" not in done:
            continue
        journal = Journal(run_dir.journal(stage))
        for step in range(1, 21):
            journal.log(
                step,
                {
                    "loss": 5.0 / step**2,
                    "learning_rate": 1e-3,
                    "tokens_per_s": 9e3,
                    "grad_norm": 1.0,
                    "gate_opening": 0.1 * step,
                },
            )
        journal.log(20, {"validation_loss": 0.5})
        journal.close()
        if model_dir:
            shutil.copytree(model_dir, run_dir.model(stage))
    if "rationales" in done:
        _write_texts(run_dir, settings, data, wrong, spoil, agreements, with_answers="evaluate" in done)
    return folder


def _write_texts(run_dir, settings, data, wrong, spoil, agreements, *, with_answers):
    open_output(run_dir.texts("rationales"), {})
    files = {}
    for split in ("val", "test"):
        problems = read_problems(data.path, split)
        lines = []
        for number, (qid, problem) in enumerate(problems.items()):
            gold = gold_rationale(problem, settings.rationale.format)
            is_wrong, is_unread = number % wrong == 1, number == 0 and split == "test"
            choice = None if is_unread else (problem.answer + is_wrong) % len(problem.choices)
            answer = "mumble" if is_unread else f"The answer is ({chr(65 + choice)})."
            lines.append(
                {
                    "qid": qid,
                    "rationale": spoil(gold) if number % 3 == 1 else gold,
                    "answer_text": answer,
                    "prediction": choice,
                }
            )
            if agreements:
                share = agreements[number % len(agreements)]
                lines[-1] |= {"agreement": share, "rationale_agreement": share / 2}
        texts = {line["qid"]: line["rationale"] for line in lines}
        for task in list_tasks(data.path, [split], task_samples=256):
            part = [{"qid": qid, "rationale": text, "num_tokens": 9, "finish": "eos"} for qid, text in texts.items()]
            path = write_task(run_dir.texts("rationales"), task, part[task.start : task.start + task.num_samples])
            files[task.file_name] = {"num_samples": task.num_samples, "sha256": sha256_of_file(path)}
        if with_answers:
            run_dir.predictions.mkdir(exist_ok=True)
            (run_dir.predictions / f"{split}.jsonl").write_text(
                "".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8"
            )
            commit_json(run_dir.scores(split), score(lines, problems, split=split, gold_reasons=settings.gold_reasons))
    close_output(run_dir.texts("rationales"), files=files, summary={})
