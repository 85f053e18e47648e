"""What a training counts: operations, padding, the gate."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from launcher.training.throughput import COUNTS, Meter
from mmcot.models.device import DTYPES, open_device
from mmcot.models.flops import measure_peak_flops
from mmcot.models.t5 import MultimodalT5Config, T5ForMultimodalGeneration


def make_model(**changes):
    shape = {
        "vocab_size": 200,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 96,
        "num_layers": 3,
        "num_decoder_layers": 2,
        "num_heads": 4,
    }
    vision = {"vision_num_patches": 9, "vision_dim": 20}
    torch.manual_seed(0)
    return T5ForMultimodalGeneration(
        MultimodalT5Config(**shape, **vision, dropout_rate=0.0, decoder_start_token_id=0, **changes)
    ).eval()


@pytest.mark.parametrize("projection", ["relu", "gated-gelu"])
@pytest.mark.parametrize("with_picture", [True, False])
def test_operations_are_those_that_torch_counts(projection, with_picture):
    model = make_model(feed_forward_proj=projection, attn_implementation="eager")
    inputs = {"input_ids": torch.ones(2, 17, dtype=torch.long), "labels": torch.ones(2, 11, dtype=torch.long)}
    if with_picture:
        inputs["vision_features"] = torch.ones(2, 9, 20)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    ours = model.forward_flops([17, 17], [11, 11], num_patches=9 if with_picture else 0)
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_padding_and_flops_reach_the_metrics():
    meter = Meter(peak_flops=1e9)
    counts = {
        "tokens": 30,
        "pairs": 0,
        "pair_tokens": 0,
        "source_tokens": 70,
        "padded_tokens": 120,
        "questions": 4,
        "flops": 1e6,
        "bytes_read": 0,
        "bytes_needed": 0,
    }
    meter.add([counts[name] for name in COUNTS])
    point = meter.collect()
    assert point["padding_factor"] == pytest.approx(1.2) and 0 < point["mfu"] < 1e6 and point["memory_gb"] > 0.01
    assert point["mfu"] == pytest.approx(point["tflops_per_s"] * 1e12 / 1e9)


def test_the_gate_is_the_mean_over_real_positions_of_questions_with_a_picture():
    model = make_model()
    features = torch.randn(2, 9, 20)
    tensors = {
        "input_ids": torch.randint(2, 200, (2, 6)),
        "attention_mask": torch.tensor([[1] * 6, [1] * 3 + [0] * 3]),
        "vision_features": features,
        "vision_mask": torch.tensor([[True] * 9, [False] * 9]),
    }
    model.encoder.gate_dense.weight.data.zero_()
    model.encoder.gate_dense.bias.data.fill_(1.0)
    model.encoder(**tensors)
    assert model.watch() == {}  # nobody watched
    model.observe(tensors)
    model.encoder(**tensors)
    assert model.watch()["gate_opening"] == pytest.approx(torch.sigmoid(torch.tensor(1.0)).item(), rel=1e-6)
    model.observe({**tensors, "vision_mask": torch.zeros(2, 9, dtype=torch.bool)})
    model.encoder(**tensors)
    assert model.watch() == {}  # no picture was seen


def test_the_peak_is_what_a_matrix_product_reaches():
    assert 1e8 < measure_peak_flops(torch.device("cpu"), torch.float32) < 1e15


@pytest.mark.parametrize(("precision", "tf32"), [("bf16", False), ("fp32", True), ("fp32", False)])
def test_the_peak_is_measured_in_the_numbers_that_the_training_computes_in(monkeypatch, precision, tf32):
    seen, multiply = [], torch.matmul

    def matmul(a, b):
        seen.append((a.dtype, torch.backends.cuda.matmul.allow_tf32))
        return multiply(a, b)

    monkeypatch.setattr(torch, "matmul", matmul)
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        open_device(use_gpu=False, precision=precision, tf32=tf32)
        measure_peak_flops(torch.device("cpu"), DTYPES[precision])
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert set(seen) == {(DTYPES[precision], tf32)}
