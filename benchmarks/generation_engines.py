"""transformers' ``generate`` and ours: functions that write all texts of ``generation.py``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from generation_model import MAX_NEW_TOKENS, MAX_SOURCE_TOKENS
from generation_rounds import Ids, Write, Written
from peers.protocol import by_length, until_end, with_generate
from transformers import T5ForConditionalGeneration

from mmcot.decoding.generation import generate_ids
from mmcot.decoding.rows import Rows, open_rows
from mmcot.models.t5 import T5ForMultimodalGeneration

BASE = "transformers, fp32, 32 rows, data order"
ROWS = (32, 64)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
END_TOKENS = (1,)


def own_engines(
    folder: Path, sources: Ids, *, dtypes: Sequence[str] = tuple(DTYPES), numbers_of_rows: Sequence[int] = ROWS
) -> dict[str, Write]:
    """Our engines, kept open from text to text as a worker does, by their names."""
    engines = {}
    for dtype in dtypes:
        model = open_ours(folder).to(DTYPES[dtype])
        for rows in numbers_of_rows:
            opened = open_rows(model, num_rows=rows, max_source_tokens=MAX_SOURCE_TOKENS, max_new_tokens=MAX_NEW_TOKENS)
            engines[f"ours, {dtype}, {rows} rows"] = _ours(model, sources, opened)
    return engines


def transformers_engines(model: Any, sources: Ids) -> dict[str, Write]:
    """``generate`` in data order, as it is usually called, and with the sources sorted by length."""
    write, rows = with_generate(model, MAX_NEW_TOKENS), 32
    sorted_write = by_length(write, rows)

    def in_data_order() -> Ids:
        starts = range(0, len(sources), rows)
        return [text for start in starts for text in write(sources[start : start + rows])]

    return {
        BASE: timed(in_data_order),
        f"transformers, fp32, {rows} rows": timed(lambda: sorted_write(sources)),
    }


def open_theirs(folder: Path) -> Any:
    """The model as transformers' T5 in fp32."""
    return T5ForConditionalGeneration.from_pretrained(folder, trust_remote_code=False).eval()


def open_ours(folder: Path) -> T5ForMultimodalGeneration:
    """The same weights in our model; it has a fusion too, which texts without pictures do not use."""
    return T5ForMultimodalGeneration.from_pretrained(folder, trust_remote_code=False).eval()


def _ours(model: T5ForMultimodalGeneration, sources: Ids, rows: Rows) -> Write:
    def write() -> Ids:
        return generate_ids(
            model,
            sources,
            [None] * len(sources),
            feature_shape=(1, 1),
            num_rows=rows.num_rows,
            max_new_tokens=MAX_NEW_TOKENS,
            eos_token_ids=END_TOKENS,
            rows=rows,
        )

    return timed(write)


def timed(write: Any) -> Write:
    """A function that writes ids, with the seconds of the processor that it takes."""

    def measured() -> Written:
        started = time.process_time()
        ids = write()
        seconds = time.process_time() - started
        return Written([until_end(row) for row in ids], seconds)

    return measured


def reference_texts(model: Any, sources: Ids) -> Ids:
    """The ids of ``generate`` for one source at a time, which has no padding."""
    write = with_generate(model, MAX_NEW_TOKENS)
    return [until_end(write([source])[0]) for source in sources]


@torch.inference_mode()
def margin(model: Any, source: Sequence[int], begun: Sequence[int]) -> float:
    """The margin between the two best logits for the token after the ones that are begun."""
    decoder_ids = torch.tensor([[model.config.decoder_start_token_id, *begun]])
    best = model(input_ids=torch.tensor([list(source)]), decoder_input_ids=decoder_ids).logits[0, -1].topk(2).values
    return (best[0] - best[1]).item()
