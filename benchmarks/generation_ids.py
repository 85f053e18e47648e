"""Are the ids of a run's rationales those of transformers' generate, question by question?

    PYTHONPATH=. python benchmarks/generation_ids.py RUN [--split test] [--questions 800]

RUN is a finished run: its stage-one model with its own pictures, which writes the end token. Ours are written with
rows that are refilled, theirs one question at a time. Where they differ, prints the margin between the two best
logits, and the difference between float32 and float64 in these logits.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import numpy as np
import torch
import yaml

from launcher.config.loading import parse_settings
from launcher.runs.run_dir import RunDir, shards_dir_of
from launcher.stages.samples import open_stage
from mmcot.decoding.generation import generate_ids
from mmcot.models.opening import open_model
from mmcot.texts.encoding import stack_features
from mmcot.texts.tokenizer import open_tokenizer


@torch.inference_mode()
def main(run: Path, split: str, num_questions: int) -> None:
    torch.set_num_threads(1)
    run_dir = RunDir(run)
    settings = parse_settings(yaml.safe_load((run / "run.yaml").read_text(encoding="utf-8")))
    tokenizer = open_tokenizer(run_dir.model("rationale"))
    model = open_model(run_dir.model("rationale")).eval()
    samples = open_stage(
        settings,
        "rationale",
        split,
        shards_dir=run.parent.parent / shards_dir_of(run_dir),
        tokenizer=tokenizer,
    )
    numbers = range(min(num_questions, len(samples)))
    sources = [list(samples.encode(number).source_ids) for number in numbers]
    features = [samples.reader.features(number) for number in numbers]
    limit, shape = settings.rationale.max_target_tokens, samples.reader.feature_shape
    ours = generate_ids(
        model, sources, features, feature_shape=shape, max_new_tokens=limit, num_rows=64, eos_token_ids=[1]
    )
    exact, parted, errors = copy.deepcopy(model).double(), [], []
    for number, (source, picture, ids) in enumerate(zip(sources, features, ours, strict=True)):
        inputs = {"input_ids": torch.tensor([source]), "attention_mask": torch.ones(1, len(source), dtype=torch.long)}
        inputs |= stack_features([picture], shape)
        theirs = model.generate(**inputs, max_new_tokens=limit, do_sample=False, num_beams=1)[0, 1:].tolist()
        if theirs != ids or number % 40 == 0:
            given = torch.tensor([[0, *ids[:-1]]])
            logits = model(**inputs, decoder_input_ids=given).logits[0]
            errors.append((logits - exact(**inputs, decoder_input_ids=given).logits[0]).abs().max().item())
        if theirs != ids:
            place = next(i for i, (a, b) in enumerate(zip(theirs, ids, strict=False)) if a != b)
            best = logits[place].topk(2).values
            parted.append(f"question {samples.reader.qid(number)}, token {place}: margin {best[0] - best[1]:.1e}")
    lengths = [len(ids) for ids in ours]
    print(
        f"{len(ours) - len(parted)} of {len(ours)} equal to generate; {sum(ids[-1] == 1 for ids in ours)} ended with "
        "the end token, "
        f"{min(lengths)} to {max(lengths)} tokens, {len({tuple(ids) for ids in ours})} different texts"
    )
    print(
        f"they differ at: {parted or 'none'}; float32 and float64 logits differ by {np.median(errors):.1e} (median), "
        f"{max(errors):.1e} (most)"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--split", default="test")
    parser.add_argument("--questions", type=int, default=800)
    arguments = parser.parse_args()
    main(arguments.run, arguments.split, arguments.questions)
