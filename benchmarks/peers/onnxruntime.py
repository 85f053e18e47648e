"""ONNX Runtime by Hugging Face's optimum: fp32 and int8 (``quantize_dynamic``), a decoder with a cache, one thread."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import onnxruntime
from onnxruntime.quantization import QuantType, quantize_dynamic
from optimum.onnxruntime import ORTModelForSeq2SeqLM

from benchmarks.peers.protocol import Ids, by_length, made_once, serve, with_generate

BATCH_SIZE = 32


def open_engines(model: Path, converted: Path, max_new_tokens: int) -> dict[str, Callable[[Ids], Ids]]:
    """An engine for each type of numbers."""
    made_once(converted, lambda folder: export(model, folder))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    engines = {}
    for name in ("fp32", "int8"):
        opened = ORTModelForSeq2SeqLM.from_pretrained(
            converted / name, use_merged=False, session_options=options, trust_remote_code=False
        )
        engines[f"{name}, {BATCH_SIZE} rows"] = by_length(with_generate(opened, max_new_tokens), BATCH_SIZE)
    return engines


def export(model: Path, converted: Path) -> None:
    """Write the encoder, the decoder of the first token and the one with a cache, in fp32 and in int8."""
    exported = ORTModelForSeq2SeqLM.from_pretrained(model, export=True, use_merged=False, trust_remote_code=False)
    exported.save_pretrained(converted / "fp32")
    (converted / "int8").mkdir()
    for path in sorted((converted / "fp32").glob("*.onnx")):
        quantize_dynamic(path, converted / "int8" / path.name, per_channel=True, weight_type=QuantType.QInt8)
    for path in (converted / "fp32").glob("*.json"):
        shutil.copy(path, converted / "int8")


if __name__ == "__main__":
    serve(open_engines)
