"""Makes docs/performance.md and its picture from the numbers in benchmarks/results/, and from nothing else.

    python benchmarks/performance_page.py [--results DIR] [--page FILE]

``make bench`` measures and calls it. A part whose file is missing is named as not measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from performance_plot import bars

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "performance.md"
PICTURE = ROOT / "docs" / "images" / "generation.svg"
PARTS = ("training", "training-2", "checkpoints", "generation", "stream", "features")
ONE_PROCESS, TWO_PROCESSES, TRAINER, PAUSE_S = 0.95, 0.9, 1.15, 1.0  # the aims
GENERATE, SHARING = 5.7, (3.0, 0.2)
OURS, RIVAL = "ours, fp32, 64 rows", "CTranslate2, fp32, 64 rows"
BARE = "bare loop, fused AdamW"

INTRODUCTION = """# Performance

mmcot beside other programs that do the same work. `benchmarks/performance_page.py` makes this page from the files in
[benchmarks/results/](../benchmarks/results) alone; `make bench` measures, writes these files and makes the page again.
More measurements are in [measurements.md](measurements.md).

A ratio compares two programs within one run, round by round: the median, and in brackets the lowest and the highest
round. Above 1 the program of the row is faster. Seconds depend on the machine and on what else it does; do not compare
them with those of another one.
"""


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """The files of a folder by part; parts without a file are left out."""
    return {part: json.loads(path.read_text()) for part in PARTS if (path := folder / f"{part}.json").exists()}


def render(results: dict[str, dict[str, Any]]) -> str:
    """The page of these results."""
    sections = [INTRODUCTION, "## Aims\n\n" + aims(results)]
    for part, title, command, content in SECTIONS:
        text = f"## {title}\n\n`{command}`"
        if part in results:
            text += f"; {describe(results[part])}\n\n{content(results[part])}"
        else:
            text += " has not been measured.\n"
        sections.append(text)
    return "\n".join(sections)


def aims(results: dict[str, dict[str, Any]]) -> str:
    """Each aim, what was measured, and whether it was reached."""
    rows = []
    for part, aim, processes in (("training", ONE_PROCESS, "one process"), ("training-2", TWO_PROCESSES, "two")):
        for name, numbers in results.get(part, {}).get("loops", {}).items():
            if name.startswith("ours") and "blocks of" not in name:  # the bare loop has other blocks
                found = numbers["of_bare_loop"]
                what = f"{name}, of the bare loop, {processes}"
                rows.append((what, f">= {aim}", spread(found), found["median"] >= aim))
    if loops := results.get("training", {}).get("loops"):
        for own in (name for name in loops if name.startswith("ours")):
            best, found = beside_best_of_trainer(loops, own)
            what = f"{own}, of transformers' Trainer at its best ({best.removeprefix('Trainer, ')})"
            rows.append((what, f">= {TRAINER}", spread(found), found["median"] >= TRAINER))
    for name, values in results.get("checkpoints", {}).get("seconds", {}).items():
        if name.startswith("ours") and name.endswith("training stops"):
            stops = statistics.median(values)
            rows.append((f"checkpoint: {name}", f"<= {PAUSE_S:g} s", f"{spread_of(values)} s", stops <= PAUSE_S))
    rows += generation_aims(results.get("generation", {}))
    lines = [(*row[:3], "reached" if row[3] else "**missed**") for row in rows]
    return table(("what", "aim", "measured", ""), lines) if lines else "Nothing has been measured.\n"


def generation_aims(report: dict[str, Any]) -> list[tuple[str, str, str, bool]]:
    """The aims of generation, as ``aims`` lists them."""
    rows, engines = [], report.get("engines", {})
    if ours := engines.get(OURS):
        is_reached = ours["ratio"]["median"] >= GENERATE
        rows.append((f"{OURS}, of transformers' generate", f">= {GENERATE}", spread(ours["ratio"]), is_reached))
        if rival := engines.get(RIVAL):
            pairs = zip(ours["ratio"]["each"], rival["ratio"]["each"], strict=True)
            each = [own / other for own, other in pairs]
            found = {"median": statistics.median(each), "low": min(each), "high": max(each)}
            rows.append((f"{OURS}, of {RIVAL}", ">= 1", spread(found), found["median"] >= 1))
    for what, ratio in report.get("sharing", {}).items():
        most = SHARING[0] if "candidates" in what else SHARING[1]
        rows.append((f"generation: {what}, time", f"<= {most}", spread(ratio), ratio["median"] <= most))
    return rows


def beside_best_of_trainer(loops: dict[str, Any], own: str) -> tuple[str, dict[str, Any]]:
    """The Trainer's fastest way to pad, and how much faster a loop of ours is, round by round."""
    best = min(
        (name for name in loops if name.startswith("Trainer")),
        key=lambda name: -loops[name]["of_bare_loop"]["median"],
    )
    pairs = zip(loops[own]["of_bare_loop"]["each"], loops[best]["of_bare_loop"]["each"], strict=True)
    ratios = [ours / theirs for ours, theirs in pairs]  # each was measured beside the bare loop
    return best, {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}


def training(report: dict[str, Any]) -> str:
    """One process: all loops."""
    rows = [
        (
            name,
            f"{numbers['tokens_per_processor_second']:,.0f}",
            spread(numbers["of_bare_loop"], 3),
            f"{numbers['padded_over_real']:.2f}",
            spread(numbers["seconds_per_step"]),
        )
        for name, numbers in report["loops"].items()
    ]
    checks = report["checks"]
    tiny, this = (max(row["all_steps"] for row in checks[which].values()) for which in ("tiny_model", "this_model"))
    first = max(row["first_step"] for row in checks["this_model"].values())
    steps = next(iter(checks["tiny_model"].values()))["steps"]
    head = ("loop", "real tokens a processor-second", "of the bare loop", "tokens with padding / real", "s a step")
    return (
        table(head, rows)
        + f"\nA T5 of the small size with fusion, ViT-shaped features, {report['questions']:,} questions"
        f" with {report['real_tokens']:,} real tokens, batches of {report['batch']} in blocks of {report['block']}, "
        f"{report['threads']} thread, {report['steps']} batches that stand for an epoch (every n-th by padded tokens; "
        "padded to 512 all take the same time, so one). The same weights, optimizer and clipping.\n\n"
        "Checked first: the losses of the loops over the same blocks differ by at most "
        f"{first:.0e} at the first step and {this:.0e} over all (relative), over {steps} steps of a tiny model by "
        f"{tiny:.0e}; the Trainer's loss of a block differs from ours by "
        f"{checks['trainer']['relative_difference']:.0e}, and each of its epochs has every question once.\n"
    )


def two_processes(report: dict[str, Any]) -> str:
    """Two ranks: the bare loop and ours."""
    rows = [
        (
            name,
            spread(numbers["of_bare_loop"], 3),
            spread(numbers["of_bare_loop_by_time"], 3),
            spread(numbers["seconds_per_step"]),
        )
        for name, numbers in report["loops"].items()
    ]
    worst = max(row["all_steps"] for row in report["checks"]["this_model"].values())
    return (
        table(("loop", "of the bare loop, by processor time", "by time", "s a step"), rows)
        + f"\nThe same questions and model on {report['ranks']} processes of one thread over gloo. The bare loop sums "
        f"all gradients by one all-reduce. The losses differ by at most {worst:.0e} (relative).\n"
    )


def checkpoints(report: dict[str, Any]) -> str:
    """Seconds of checkpoints."""
    rows = [(name, spread_of(values)) for name, values in report["seconds"].items()]
    return table(("what", "seconds"), rows) + f"\nA model of {report['parameters']:,} parameters in fp32, one rank.\n"


def generation(report: dict[str, Any]) -> str:
    """Tokens a processor-second of the engines, equal texts, and the picture."""
    engines, texts = report["engines"], report["questions"]
    rows = [
        (
            engine,
            f"{numbers['tokens_per_processor_second']['median']:,.0f}",
            spread(numbers["ratio"]),
            f"{numbers['tokens']:,}",
            f"{numbers['equal_texts']} of {numbers['texts']}",
            margins(numbers["differ_at"]),
        )
        for engine, numbers in by_speed(engines)
    ]
    head = ("engine", "tokens a processor-second", "ratio", "tokens", "equal texts", "margins where they differ")
    slow, memory = report["no_cache_padded_to_512"], report["peak_memory_gb"]
    memory = " and ".join(f"{value:.2f} GB for {number}" for number, value in memory.items())
    peers = [f"{title} ({versions_of(packages)})" for title, packages in report["peers"].items()]
    left_out = "".join(f" Left out: {name}, because {why}." for name, why in report["left_out"].items())
    return (
        f"![Speed of the engines beside transformers](images/{PICTURE.name})\n\n"
        + table(head, rows)
        + f"\nA plain T5 of the small size writes {texts:,} texts, free-running to the end token or "
        f"{report['longest']} tokens ({report['ended']} of {texts} end; {report['tokens']:,} tokens, "
        f"{report['different_texts']} different texts), greedily, on one thread, with a cache. Ratios are to "
        "transformers' `generate` in data order; all other engines get the sources sorted by length. Equal texts "
        "have the ids that `generate` writes for one source at a time; a margin is that between its two best logits "
        "at the first token that differs. Without a cache, padded to 512, `generate` writes "
        f"{slow['tokens_per_processor_second']:.1f} tokens a processor-second ({slow['sources']} sources, once). Peak "
        f"memory of a process of ours: {memory} questions.\n\n"
        + table(("processor time", "ratio"), [(what, spread(ratio)) for what, ratio in report["sharing"].items()])
        + "\n"
        f"Each in an environment of its own ([benchmarks/peers/](../benchmarks/peers)): {'; '.join(peers) or 'none'}."
        f"{left_out}\n"
    )


def by_speed(engines: dict[str, Any]) -> list[tuple[str, Any]]:
    """The engines, the slowest first."""
    return sorted(engines.items(), key=lambda item: item[1]["ratio"]["median"])


def margins(differ_at: list[dict[str, Any]]) -> str:
    """Lowest and highest margin of the texts that differ."""
    found = [each["margin"] for each in differ_at]
    return f"{min(found):.1g} to {max(found):.1g}" if found else ""


def versions_of(packages: dict[str, str]) -> str:
    """Names and versions in one line."""
    return ", ".join(f"{name} {version}" for name, version in packages.items())


def plot(report: dict[str, Any]) -> str:
    """The picture of the engines' speeds, an SVG."""
    rows = [
        (name, numbers["ratio"], "" if not (others := len(numbers["differ_at"])) else f"{others} texts differ")
        for name, numbers in by_speed(report["engines"])
    ]
    return bars("Text generation on one thread: speed, transformers' generate = 1", rows)


def stream(report: dict[str, Any]) -> str:
    """Samples a second, bytes by ranges, memory."""
    rows = [
        (
            what,
            f"{found['ours']['samples_per_processor_second']['median']:,.0f}",
            f"{found['webdataset']['samples_per_processor_second']['median']:,.0f}",
            spread(found["ours"]["ratio"]),
        )
        for what, found in report["throughput"].items()
    ]
    ranges = [
        (row["ranks"], f"{row['bytes_read'] / row['bytes_needed']:.2f}", f"{row['requests']:,}")
        for row in report["ranges"]
    ]
    memory = ", ".join(f"{value:,.0f} MB over {number} samples" for number, value in report["peak_memory_mb"].items())
    return (
        table(("one process", "mmcot, samples a processor-second", "webdataset", "ratio"), rows)
        + f"\n{report['samples']:,} questions, features {report['features']}; mmcot in shuffled order, webdataset in "
        "the order of the tars.\n\n"
        + table(("ranks, ranges from an S3 server", "bytes read / needed", "requests"), ranges)
        + f"\nPeak memory of a walk over an epoch: {memory}.\n"
    )


def features(report: dict[str, Any]) -> str:
    """Pictures a second by kind of encoder."""
    rows = [
        (kind, f"{found['loop']['median']:.1f}", f"{found['ours']['median']:.1f}", spread(found["ratio"]))
        for kind, found in report["kinds"].items()
    ]
    return (
        table(("encoder", "loop over pictures, a second", "two Ray workers", "ratio"), rows)
        + f"\nEncoders of a small size with random weights, {report['pictures']} pictures of "
        f"{report['kilobytes']:.0f} kB, each used four times; {report['threads_of_loop']} thread(s) in the loop.\n"
    )


SECTIONS: tuple[tuple[str, str, str, Callable[[dict[str, Any]], str]], ...] = (
    ("training", "Training", "python benchmarks/training.py", training),
    ("training-2", "Training on two processes", "python benchmarks/training.py --ranks 2", two_processes),
    ("checkpoints", "Checkpoints", "python benchmarks/checkpoints.py", checkpoints),
    ("generation", "Generation", "python benchmarks/generation.py", generation),
    ("stream", "Stream", "python benchmarks/stream.py", stream),
    ("features", "Features of pictures", "python benchmarks/features.py", features),
)


def describe(report: dict[str, Any]) -> str:
    """Commit, machine, versions and data set of a report as a sentence."""
    found = report.get("conditions", report)
    commit, cores = (found.get("commit") or "unknown")[:7], found.get("cores", found.get("processors"))
    changed = found.get("uncommitted_changes", found.get("has_uncommitted_changes"))
    versions = found.get("versions", {name: found[name] for name in ("python", "torch", "deepspeed") if name in found})
    load = found.get("load_average", 0.0)
    load = load[0] if isinstance(load, list) else load
    parts = [f"commit {commit}" + (" with uncommitted changes" if changed else ""), f"{cores} cores"]
    parts += [f"{name} {version}" for name, version in versions.items()]
    parts += [f"data: {report['data']}"] if "data" in report else []
    busy = f", and other programs used the machine (load average {load:.0f})" if load > (cores or 1) + 1 else ""
    return ", ".join(parts) + busy + "."


def spread(numbers: dict[str, Any], digits: int = 2) -> str:
    """Median (lowest to highest)."""
    return f"{numbers['median']:.{digits}f} ({numbers['low']:.{digits}f} to {numbers['high']:.{digits}f})"


def spread_of(values: list[float]) -> str:
    """Median (lowest to highest) of values."""
    return spread({"median": statistics.median(values), "low": min(values), "high": max(values)})


def table(head: Iterable[Any], rows: Iterable[Iterable[Any]]) -> str:
    """A table of Markdown."""
    lines = [list(head), *rows]
    marked = ["| " + " | ".join(map(str, line)) + " |" for line in lines]
    return "\n".join([marked[0], "|" + "---|" * len(lines[0]), *marked[1:]]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    options = parser.parse_args()
    results = read_results(options.results)
    options.page.write_text(render(results))
    if "generation" in results:
        options.picture.write_text(plot(results["generation"]))
    print(f"written: {options.page}")


if __name__ == "__main__":
    main()
