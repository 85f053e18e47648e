"""Every commit point of jobs with every kind of fault.

    commit_points.py FOLDER [--seed 0] [--share 1.0] [--jobs texts folder] [--faults SIGTERM] [--out RESULT.json]
    commit_points.py --table RESULT.json [RESULT.json ...]     # Markdown

A trace of an undisturbed run lists a job's commit points (``fault_points.py``). For every point and every fault that
can happen there the job runs in a process of its own, a fork of this one, with the fault at this point; then it runs
again, undisturbed, and its folder must be the same, byte by byte. After a stop (SIGSTOP) another process takes the job
over where it has an owner, and the first one continues afterwards. A changed byte must be noticed by whoever reads the
file: the file is made again, or is named. Files that nothing protects are counted apart.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path

import fault_jobs
import fault_jobs_of_runs as of_runs
import fault_jobs_of_tracking as of_tracking
import fault_points
import torch
from fault_jobs import Job
from fault_points import FAULTS, KINDS
from fault_trials import Process, Trials

from launcher.runs.code_version import code_version

LOCK, LINES = (r"lock\.json",), r"\.jsonl$"
JOBS = {
    # The drawn pictures are the input of the build; of the tokenizer, tokenizer.json alone is in fingerprints.
    "data": Job(
        fault_jobs.build_data,
        fault_jobs.read_data,
        unprotected=(r"mini_sqa-source", r"tokenizer/(?!\.?tokenizer\.json)"),
    ),
    "texts": Job(fault_jobs.write_texts, fault_jobs.read_texts),
    "folder": Job(fault_jobs.replace_folder, fault_jobs.read_folder, unprotected=(r"model\.json", r"standing")),
    "generation": Job(fault_jobs.generate, fault_jobs.read_generated, is_owned=True, volatile=LOCK, unprotected=LOCK),
    "journal": Job(
        fault_jobs.write_lines,
        fault_jobs.read_lines,
        is_owned=True,
        volatile=(*LOCK, LINES, r"progress\.json"),  # the progress stands for a checkpoint, a job of its own
        unprotected=(*LOCK, LINES, r"progress\.json"),
    ),
    "checkpoint": Job(
        of_runs.train,
        of_runs.read_checkpoints,
        is_owned=True,
        has_store=True,
        volatile=(*LOCK, r"run/logs/", r"step-00000[123]/"),
        # The best model is protected from the next checkpoint's manifest on.
        unprotected=(*LOCK, r"logs/identity", r"^run/rationale/(\.staging-)?best"),
    ),
    "run folder": Job(
        of_runs.run_steps,
        of_runs.read_run,
        is_owned=True,
        volatile=(*LOCK, r"/logs/", r"/steps/", r"rank-token"),
        # A model's files are protected from the end of its step on: the marker has their sha256.
        unprotected=(*LOCK, LINES, r"run\.yaml", r"identity", r"rank-token", r"logs/code-", r"steps/", r"model/"),
    ),
    "tracking": Job(
        of_tracking.track,
        of_tracking.read_server,
        is_owned=True,
        has_store=True,
        settle=of_tracking.sync,
        volatile=(*LOCK, r"/logs/", r"mlflow\.json", r"server\.jsonl", r"/steps/"),
        unprotected=(*LOCK, LINES, r"run\.yaml", r"identity", r"mlflow\.json", r"steps/"),
    ),
}


def run_all(place: Path, names, faults, *, seed: int, share: float) -> dict:
    """Every chosen trial; ``share`` of them, drawn by the seed."""
    torch.set_num_threads(1)
    code_version()
    if "generation" in names:
        (place / "shared").mkdir(parents=True, exist_ok=True)
        Process(place, lambda: fault_jobs.build_data(place / "shared"), fault_points.Points(place)).wait()
    chance, found = random.Random(seed), {"seed": seed, "share": share, "jobs": {}, "wrong": []}
    for name in names:
        started, trials = time.monotonic(), Trials(place, name, JOBS[name], seed)
        kinds = [kind for kind, *_ in trials.points]
        of_job = {
            "points": {kind: kinds.count(kind) for kind in KINDS if kind in kinds},
            "trials": {},
            "outcomes": {},
            "unprotected": [],
            "waited": [],
        }
        for fault in faults:
            for number, (kind, path, _) in enumerate(trials.points):
                if not trials.can_happen(fault, number) or chance.random() >= share:
                    continue
                outcome, more = trials.trial(fault, number)
                of_job["trials"].setdefault(fault, {}).setdefault(kind, 0)
                of_job["trials"][fault][kind] += 1
                of_job["outcomes"].setdefault(fault, {}).setdefault(outcome, 0)
                of_job["outcomes"][fault][outcome] += 1
                if outcome == "wrong":
                    found["wrong"].append({"job": name, "fault": fault, "point": [number, kind, path], "what": more})
                elif outcome in ("unprotected", "waited"):
                    of_job[outcome].append(more or f"{kind} {path}")
        of_job["seconds"] = round(time.monotonic() - started, 1)
        found["jobs"][name] = of_job
    return found


def table(paths) -> str:
    """The results of some files in Markdown: trials by job and fault, wrong ones in brackets."""
    results = [json.loads(path.read_text()) for path in paths]
    jobs = {name: job for result in results for name, job in result["jobs"].items()}
    rows = [["job", "points", *FAULTS, "trials", "wrong"], ["---"] * (len(FAULTS) + 4)]
    for name, job in jobs.items():
        counts = {fault: sum(job["trials"].get(fault, {}).values()) for fault in FAULTS}
        wrong = {fault: job["outcomes"].get(fault, {}).get("wrong", 0) for fault in FAULTS}
        cells = [f"{counts[fault] or ''}" + (f" ({wrong[fault]})" if wrong[fault] else "") for fault in FAULTS]
        points = ", ".join(f"{count} {kind}" for kind, count in job["points"].items())
        rows.append([name, points, *cells, f"{sum(counts.values())}", f"{sum(wrong.values())}"])
    total = sum(sum(kinds.values()) for job in jobs.values() for kinds in job["trials"].values())
    num_wrong = sum(fault.get("wrong", 0) for job in jobs.values() for fault in job["outcomes"].values())
    lines = [f"| {' | '.join(row)} |" for row in rows]
    for fault in ("changed byte", "SIGSTOP"):
        outcomes = Counter()
        for job in jobs.values():
            outcomes.update(job["outcomes"].get(fault, {}))
        lines += ["", f"{fault}: " + ", ".join(f"{count} {name}" for name, count in sorted(outcomes.items()))]
    unprotected = sorted({path for job in jobs.values() for path in job["unprotected"]})
    seeds = sorted({result["seed"] for result in results})
    lines += ["", f"unprotected: {', '.join(unprotected)}", "", f"{total} trials, {num_wrong} wrong, seeds {seeds}"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--jobs", nargs="+", default=list(JOBS), choices=JOBS)
    parser.add_argument("--faults", nargs="+", default=list(FAULTS), choices=FAULTS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path, nargs="+")
    options = parser.parse_args()
    if options.table:
        print(table(options.table))
        return
    found = run_all(options.folder, options.jobs, options.faults, seed=options.seed, share=options.share)
    text = json.dumps(found, indent=1)
    if options.out:
        options.out.write_text(text + "\n")
    else:
        print(text)
    sys.exit(bool(found["wrong"]))


if __name__ == "__main__":
    main()
