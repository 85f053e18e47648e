"""Features of real pictures: two Ray workers with batches compared with a loop over single pictures.

    python benchmarks/features.py [SCIENCEQA] [--rounds 3] [--pictures 0] [--out DIR]

For each kind of encoder, at a small size and with random weights, over the pictures of SCIENCEQA's test split,
interleaved: a loop that opens a picture, prepares it with transformers' own image processor and calls the model;
and the product's task over Ray workers, from the first finished shard to the last, so that starts do not count.
``--pictures`` limits their number. ``features.json`` has all numbers. SCIENCEQA: see ``results.data_set``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
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

from data_shards.sources.forms import read_questions
from data_shards.sources.pictures import open_picture
from launcher.cluster.ray_session import ray_session
from launcher.config.loading import load_settings
from launcher.data.build import prepare_data
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="?")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=0, help="at most so many different pictures; 0: all")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with data_set(options.data) as (source, name):
        write_results(options.out, "features", {"data": name, **measure(source, options.rounds, options.pictures)})


def measure(source: Path, rounds: int, num_pictures: int) -> dict:
    """Pictures a second of the loop and of ours by kind of encoder, and their ratios."""
    questions = read_questions(source)
    paths = [path for problem in questions.problems["test"] for path in questions.pictures(problem)]
    paths = paths[: num_pictures or None]
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
