"""Features of real pictures: two Ray workers with batches compared with a loop over single pictures.

    python benchmarks/features.py [SCIENCEQA] [--rounds 3] [--pictures 0] [--out DIR]
    python benchmarks/features.py SCIENCEQA [--rounds 3] --opening         # in this process, without Ray

For each kind of encoder, at a small size and with random weights, over the pictures of SCIENCEQA's test split,
interleaved: a loop that opens a picture, prepares it with transformers' own image processor and calls the model;
and the product's task over Ray workers, from the first finished shard to the last, so that starts do not count.
``--pictures`` limits their number. ``features.json`` has all numbers. SCIENCEQA: see ``results.data_set``.

With --opening, in turns: pictures opened and resized one by one or by two threads, alone and with a ViT that computes
on one thread. Printed are pictures a second of wall time and of processor time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter, deque
from pathlib import Path

import numpy as np
import torch
from results import data_set, ratios, spread, summary, write_results
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    DetrConfig,
    DetrModel,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

from data_shards.open_ahead import open_ahead
from data_shards.picture_features import features_of_pictures, open_pictures_of
from data_shards.sources.forms import read_questions
from data_shards.sources.pictures import open_picture
from launcher.cluster.ray_session import ray_session
from launcher.config.loading import load_settings
from launcher.data.build import prepare_data
from mmcot.texts.sample import Sample
from mmcot.vision.encoder_kinds import open_encoder
from mmcot.vision.encoders import VisionEncoder
from mmcot.vision.model_kinds import MODEL_KINDS

SIZE = {
    "hidden_size": 192,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 3,
    "patch_size": 32,
    "image_size": 224,
}
BACKBONE = {
    "embedding_size": 32,
    "hidden_sizes": [64, 128, 256, 512],
    "depths": [1, 1, 1, 1],
    "out_features": ["stage4"],
}


def write_model(kind: str, folder: Path) -> None:
    torch.manual_seed(0)
    if kind == "vit":
        model = ViTModel(ViTConfig(**SIZE))
    elif kind == "clip":
        text = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "vocab_size": 99,
        }
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=SIZE, projection_dim=16))
    elif kind == "resnet":
        model = ResNetModel(ResNetConfig(**BACKBONE))
    else:
        backbone = ResNetConfig(**BACKBONE)
        sizes = {
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_ffn_dim": 256,
            "decoder_ffn_dim": 256,
            "num_queries": 100,
            "d_model": 64,
        }
        model = DetrModel(
            DetrConfig(
                use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone, **sizes
            )
        )
    model.save_pretrained(folder)


def loop_rate(kind: str, folder: Path, paths: list[Path]) -> float:
    """Pictures a second of a plain loop."""
    processor_class = CLIPImageProcessorPil if kind == "clip" else ViTImageProcessorPil
    processor = processor_class(size={"height": 224, "width": 224}, do_center_crop=False)
    model = VisionEncoder(kind, folder)._model
    started = time.perf_counter()
    with torch.inference_mode():
        for path in paths:
            pixels = processor(images=open_picture(path, name=str(path)), return_tensors="pt").pixel_values
            MODEL_KINDS[kind].features(model, pixels)[0].half().numpy()
    return len(paths) / (time.perf_counter() - started)


def our_rate(kind: str, folder: Path, source: Path, shards_dir: Path) -> float:
    """Pictures a second of two workers, between the first and the last finished shard that held pictures."""
    reported: list[tuple[float, int, int]] = []

    def report(line: str) -> None:
        if line.startswith(f"  features {kind}:"):
            reported.append((time.perf_counter(), *sum_pictures(shards_dir, kind)))

    settings = load_settings(
        preset="demo",
        overrides=[
            f"data.path={source}",
            f"data.shards_dir={shards_dir}",
            f"data.features={kind}",
            f"data.vision_model={folder}",
            "data.samples_per_shard=64",
        ],
    )
    prepare_data(settings, report)
    seen = [(at, pictures) for at, pictures, _ in reported if pictures]
    return (seen[-1][1] - seen[0][1]) / (seen[-1][0] - seen[0][0])


def repeat(folder: Path, paths: list[Path], times: int) -> list[Path]:
    """Write a data set with every picture ``times`` times, in ScienceQA's layout; returns its pictures."""
    record = {
        "question": "What is it?",
        "choices": ["a", "b"],
        "answer": 0,
        "hint": "",
        "image": "image.png",
        "task": "",
        "grade": "grade2",
        "subject": "natural science",
        "topic": "",
        "category": "",
        "skill": "",
        "lecture": "",
        "solution": "",
        "split": "test",
    }
    qids = [str(number) for number in range(len(paths) * times)]
    for qid in qids:
        (folder / "images" / "test" / qid).mkdir(parents=True)
        (folder / "images" / "test" / qid / "image.png").symlink_to(paths[int(qid) % len(paths)])
    (folder / "problems.json").write_text(
        json.dumps(
            dict.fromkeys(qids, record) | {name: record | {"image": None, "split": name} for name in ("train", "val")}
        )
    )
    (folder / "pid_splits.json").write_text(json.dumps({"train": ["train"], "val": ["val"], "test": qids}))
    return [folder / "images" / "test" / qid / "image.png" for qid in qids]


def sum_pictures(shards_dir: Path, kind: str) -> tuple[int, int]:
    from data_shards.atomic_files import read_json

    notes = [read_json(path) for path in (shards_dir / "features" / kind).glob("[!.]*.done.json")]
    return sum(note["counts"]["num_with_features"] for note in notes), len(notes)


def compare_opening(paths: list[Path], rounds: int) -> None:
    """Opening alone, and opening with encoding in batches of 8, one by one and by two threads."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        write_model("vit", Path(place))
        encode, shape = open_encoder("vit", place)
        problems = [Sample(qid=str(number), question="?", choices=("a", "b"), answer=0) for number in range(len(paths))]
        named = open_pictures_of(lambda problem: [paths[int(problem.qid)]])

        def alone(num_threads: int) -> None:
            if num_threads == 0:
                for problem in problems:
                    encode.prepare(named(problem, Counter())[0])
            else:
                options = {"open_pictures": named, "prepare": encode.prepare, "num_threads": num_threads}
                deque(open_ahead(problems, Counter(), num_ahead=16, **options), maxlen=0)

        def whole(num_threads: int) -> None:
            if num_threads == 0:
                for start in range(0, len(problems), 8):
                    encode([named(problem, Counter())[0] for problem in problems[start : start + 8]])
            else:
                options = {"shape": shape, "batch_size": 8, "prepare": encode.prepare, "num_threads": num_threads}
                arrays = features_of_pictures(problems, Counter(), open_pictures=named, encode=encode, **options)
                deque(arrays, maxlen=0)

        for name, work in (("opening", alone), ("opening and encoding", whole)):
            rates: dict[int, list[tuple[float, float]]] = {0: [], 1: [], 2: []}
            for _ in range(rounds):
                for num_threads, measured in rates.items():
                    wall, cpu = time.perf_counter(), time.process_time()
                    work(num_threads)
                    measured.append(
                        (len(paths) / (time.perf_counter() - wall), len(paths) / (time.process_time() - cpu))
                    )
            for num_threads, measured in rates.items():
                wall, cpu = (statistics.median(column) for column in zip(*measured, strict=True))
                ratios = [ours[0] / one[0] for ours, one in zip(measured, rates[0], strict=True)]
                print(
                    f"{name}, {f'{num_threads} threads ahead' if num_threads else 'one by one'}: {wall:.1f} pictures/s "
                    f"({cpu:.1f} a processor second), ratio {statistics.median(ratios):.2f} "
                    f"({min(ratios):.2f} to {max(ratios):.2f})",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="?")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=0, help="at most so many different pictures; 0: all")
    parser.add_argument("--opening", action="store_true", help="opening pictures in threads, in this process")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with data_set(options.data) as (source, name):
        if options.opening:
            compare_opening(pictures_of(source, options.pictures), options.rounds)
            return
        write_results(options.out, "features", {"data": name, **measure(source, options.rounds, options.pictures)})


def pictures_of(source: Path, number: int) -> list[Path]:
    """The pictures of the test split, at most ``number``; 0: all."""
    questions = read_questions(source)
    return [path for problem in questions.problems["test"] for path in questions.pictures(problem)][: number or None]


def measure(source: Path, rounds: int, num_pictures: int) -> dict:
    """Pictures a second of the loop and of ours by kind of encoder, and their ratios."""
    paths = pictures_of(source, num_pictures)
    kilobytes = float(np.mean([path.stat().st_size for path in paths])) / 1e3
    print(f"{len(paths)} pictures, {kilobytes:.0f} kB on average; {torch.get_num_threads()} threads in the loop")
    print("each used four times", flush=True)
    report: dict = {"pictures": len(paths), "kilobytes": kilobytes, "threads_of_loop": torch.get_num_threads()}
    report["kinds"] = {}
    with tempfile.TemporaryDirectory() as place, ray_session(load_settings(preset="demo").cluster):
        source = Path(place) / "source"
        paths = repeat(source, paths, 4)
        for kind in MODEL_KINDS:
            write_model(kind, folder := Path(place) / kind)
            loop, ours = [], []
            for number in range(rounds):
                loop.append(loop_rate(kind, folder, paths))
                ours.append(our_rate(kind, folder, source, Path(place) / f"shards-{kind}-{number}"))
            found = {"loop": summary(loop), "ours": summary(ours), "ratio": ratios(ours, loop)}
            report["kinds"][kind] = found
            print(
                f"{kind}: loop {found['loop']['median']:.1f}, two workers {found['ours']['median']:.1f} pictures/s, "
                f"ratio {spread(found['ratio'])}",
                flush=True,
            )
    return report


if __name__ == "__main__":
    main()
