"""OpenVINO by Hugging Face's optimum: fp32, a decoder that keeps its cache as a state, one thread."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from optimum.intel import OVModelForSeq2SeqLM

from benchmarks.peers.protocol import Ids, by_length, made_once, serve, with_generate

BATCH_SIZE = 32
# On some processors OpenVINO computes in bf16 unless it is told not to.
OPTIONS = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1}


def open_engines(model: Path, converted: Path, max_new_tokens: int) -> dict[str, Callable[[Ids], Ids]]:
    """The engine in fp32."""
    made_once(converted, lambda folder: export(model, folder))
    opened = OVModelForSeq2SeqLM.from_pretrained(converted, ov_config=OPTIONS, trust_remote_code=False)
    return {f"fp32, {BATCH_SIZE} rows": by_length(with_generate(opened, max_new_tokens), BATCH_SIZE)}


def export(model: Path, converted: Path) -> None:
    """Write the encoder and the decoder in OpenVINO's form."""
    exported = OVModelForSeq2SeqLM.from_pretrained(model, export=True, compile=False, trust_remote_code=False)
    exported.save_pretrained(converted)


if __name__ == "__main__":
    serve(open_engines)
