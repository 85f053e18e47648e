"""States, logits, loss and gradients in fp32 and bf16 compared with float64 on the CPU."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu_parts.machine import DEVICE, ON_GPU, Proof
from benchmarks.gpu_parts.models import (
    SMALL_SHAPE,
    TINY_PATCHES,
    TINY_SHAPE,
    new_model,
    random_batch,
    relative_error,
)
from mmcot.models.device import DTYPES, open_device
from mmcot.models.loss import token_loss_sum

TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}  # relative, of states, logits and loss
STYLES: dict[str, dict[str, Any]] = {
    "relu, tied": {},
    "gated-gelu, untied": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}


def golden(proof: Proof) -> dict[str, Any]:
    """The two styles of T5 with fusion, masks and missing pictures."""
    open_device(use_gpu=ON_GPU)
    errors: dict[str, dict[str, float]] = {}
    for style, form in STYLES.items():
        shape = {**(TINY_SHAPE if proof.tiny else SMALL_SHAPE), **form}
        reference = new_model(shape, patches=TINY_PATCHES).double()
        batch = random_batch(reference.config, rows=5, source=200, target=60)
        expected = outputs_of(reference, batch)
        for precision, dtype in DTYPES.items():
            model = new_model(shape, patches=TINY_PATCHES).to(DEVICE, dtype)
            found = outputs_of(model, {name: tensor.to(DEVICE) for name, tensor in batch.items()})
            errors[f"{style}, {precision}"] = {name: relative_error(found[name], expected[name]) for name in expected}
    checks = {
        f"{name}: {what} within {TOLERANCE[name[-4:]]:g} of float64": error[what] <= TOLERANCE[name[-4:]]
        for name, error in errors.items()
        for what in ("encoder", "logits", "loss")
    }
    headline = ", ".join(f"logits {name} {error['logits']:.1e}" for name, error in errors.items())
    return {"relative_errors": errors, "headline": headline, "checks": checks}


def outputs_of(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Encoder states and logits of real tokens, the loss a token, and all gradients in one vector."""
    inputs = {**batch, "vision_features": batch["vision_features"].to(model.dtype)}
    labels = inputs.pop("labels")
    states = model.encoder(**inputs).last_hidden_state
    logits = model(**inputs, decoder_input_ids=model._shift_right(labels), use_cache=False).logits
    loss = token_loss_sum(logits, labels) / (labels != -100).sum()
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    flat = torch.cat([gradient.double().cpu().flatten() for gradient in gradients if gradient is not None])
    mask, is_target = batch["attention_mask"].cpu().bool(), labels.cpu() != -100
    return {"encoder": states.cpu()[mask], "logits": logits.cpu()[is_target], "loss": loss, "gradients": flat}
