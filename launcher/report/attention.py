"""The attention over pictures of a run's models, for a few questions, as plain values for the report's page.

    {"qid": "4402", "tokens": ["Question", ":", " Which", ...], "gate": [0.12, ...], "num_patches": 64,
     "attention": "<base64 of uint8 [S, P]>", "scale": [0.31, ...], "mean": [0.02, ...]}

A row of ``attention`` is a token's shares over the patches, divided by the largest of them
(``scale``), times 255; ``mean`` is the mean over the tokens, the end token included. Tokens are those of the source, or
the media tokens ``<image 1>``, ``<image 2>``, ... of a model with a resampler.
"""

from __future__ import annotations

import base64
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from launcher.config.settings import Settings
from launcher.runs.exported import verify_model
from launcher.runs.run_dir import RunDir
from mmcot.vision.encoder_kinds import ENCODERS


def look_at_questions(
    run_dir: RunDir, settings: Settings, stage: str, split: str, qids: Sequence[str], *, shards_dir: Path
) -> list[dict[str, Any]]:
    """Run a stage's encoder over questions, on the CPU, and return its bridge's attention and gate.

    An empty list: this kind of bridge has no attention maps.
    """
    import torch

    from launcher.stages.samples import open_stage
    from mmcot.models.device import open_device
    from mmcot.models.opening import open_model
    from mmcot.texts.tokenizer import open_tokenizer

    folder = run_dir.model(stage)
    verify_model(folder)
    tokenizer = open_tokenizer(folder)
    model = open_model(folder, dtype=torch.float32).eval()
    model.to(open_device(use_gpu=False))  # pyright: ignore[reportArgumentType], transformers' wrapper hides Module.to
    samples = open_stage(
        settings,
        stage,
        split,
        shards_dir=shards_dir,
        tokenizer=tokenizer,
        texts={text: run_dir.texts(text) for text in settings.chain.stage(stage).reads},
    )
    numbers = {str(qid): number for number, qid in enumerate(samples.reader.qids)}
    looks = []
    for qid in qids:
        if qid in numbers:
            if (look := _measure(model, tokenizer, samples, numbers[qid])) is None:
                return []
            looks.append({"qid": qid, **look})
    return looks


def grid_of(settings: Settings, num_patches: int) -> dict[str, Any]:
    """The grid of patches over a picture: {"rows", "columns"}, or {"why"} where it is not known.

    Args:
        num_patches: of all pictures of a question.
    """
    name, per_picture = settings.data.features, num_patches // settings.data.max_pictures
    if name not in ENCODERS or (grid := ENCODERS[name].grid_of(per_picture)) is None:
        return {
            "why": f"The features '{name}' are not known to be squares of the whole picture in reading order, "
            "so only the gate is shown."
        }
    rows, columns = grid
    return {"rows": rows, "columns": columns}


def _measure(model: Any, tokenizer: Any, samples: Any, number: int) -> dict[str, Any] | None:
    import torch

    from mmcot.texts.encoding import stack_features

    ids = samples.encode(number).source_ids
    vision = stack_features([samples.reader.features(number)], samples.reader.feature_shape)
    input_ids = torch.tensor([ids])
    look = model.attention_maps(input_ids, torch.ones_like(input_ids), **vision)
    if look is None:
        return None
    attention_SP = look.attention_BSP[0].numpy()
    scale_S = attention_SP.max(axis=1)
    shades_SP = np.round(255 * attention_SP / np.maximum(scale_S, 1e-12)[:, None]).astype(np.uint8)
    return {
        "tokens": [f"<image {n + 1}> " for n in range(len(attention_SP))] if look.of_media else _pieces(tokenizer, ids),
        "gate": None if look.gate_BS is None else _rounded(look.gate_BS[0].numpy()),
        "num_patches": attention_SP.shape[1],
        "attention": base64.b64encode(shades_SP.tobytes()).decode(),
        "scale": _rounded(scale_S),
        "mean": _rounded(attention_SP.mean(axis=0)),
    }


def _pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text that each token adds, with the spaces as the tokenizer decodes them."""
    texts = [tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False) for end in range(len(ids) + 1)]
    return [text[len(before) :] if text.startswith(before) else text[-1:] for before, text in itertools.pairwise(texts)]


def _rounded(values: np.ndarray) -> list[float]:
    return [float(f"{value:.4g}") for value in values]
