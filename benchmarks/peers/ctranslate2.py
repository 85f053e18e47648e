"""CTranslate2: fp32 and int8 (its own quantization of the weights, row by row), one thread.

It sorts the sources by length itself and takes rows that have ended out of a batch.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import ctranslate2
from ctranslate2.converters import TransformersConverter

from benchmarks.peers.protocol import PADDING, Ids, made_once, serve

BATCH_SIZES = (32, 64)


def open_engines(model: Path, converted: Path, max_new_tokens: int) -> dict[str, Callable[[Ids], Ids]]:
    """An engine for each type of numbers and batch size."""
    made_once(converted, lambda folder: convert(model, folder))
    vocabulary = json.loads((converted / "shared_vocabulary.json").read_text())
    engines = {}
    for name, compute_type in (("fp32", "float32"), ("int8", "int8")):
        translator = ctranslate2.Translator(
            str(converted), device="cpu", compute_type=compute_type, inter_threads=1, intra_threads=1
        )
        for size in BATCH_SIZES:
            engines[f"{name}, {size} rows"] = _writer(translator, vocabulary, size, max_new_tokens)
    return engines


def convert(model: Path, converted: Path) -> None:
    """Convert a folder of transformers' T5."""
    TransformersConverter(str(model)).convert(str(converted), force=True)
    path = converted / "config.json"
    config = json.loads(path.read_text())
    padding = json.loads((converted / "shared_vocabulary.json").read_text())[PADDING]
    tokens = {name: padding for name, token in config.items() if name.endswith("_token") and token is None}
    path.write_text(json.dumps(config | tokens))  # its reader refuses null, which the converter writes


def _writer(translator, vocabulary: list[str], batch_size: int, max_new_tokens: int) -> Callable[[Ids], Ids]:
    ids_of = {token: index for index, token in enumerate(vocabulary)}

    def write(sources: Ids) -> Ids:
        results = translator.translate_batch(
            [[vocabulary[index] for index in source] for source in sources],
            beam_size=1,
            max_batch_size=batch_size,
            max_input_length=0,
            max_decoding_length=max_new_tokens,
            return_end_token=True,
        )
        return [[ids_of[token] for token in result.hypotheses[0]] for result in results]

    return write


if __name__ == "__main__":
    serve(open_engines)
