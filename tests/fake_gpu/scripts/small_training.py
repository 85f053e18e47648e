"""A small model's engine on the stand-in, and its blocks, as the scripts here train it."""

from __future__ import annotations

import os
from typing import Any

import torch

from launcher.config.settings import Training
from launcher.stages.samples import Block
from launcher.training.deepspeed_engine import build_engine, init_distributed
from mmcot.models.lora import add_adapters
from mmcot.models.t5 import T5ForMultimodalGeneration

SHAPE = {"vocab_size": 4096, "d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 4, "num_heads": 8}
VISION = {"vision_num_patches": 9, "vision_dim": 64}


def open_engine(stage: int, precision: str, trains: str = "all", inject: str = "encoder") -> Any:
    """The engine of the only rank of a group; its model has adapters where it trains "lora".

    Pictures are media tokens unless they enter in the encoder.
    """
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", "29573")
    init_distributed(use_gpu=True, gpu_index=0)

    def build() -> Any:
        shape = SHAPE | {"feed_forward_proj": "gated-gelu"}
        media = {"inject": inject, "resample": "perceiver", "media_tokens": 8} if inject != "encoder" else {}
        model = T5ForMultimodalGeneration.start(shape, VISION | media, pad_token_id=0, eos_token_id=1)
        if trains == "lora":
            add_adapters(model, rank=8, alpha=16.0, dropout=0.1, targets=["q", "v"], seed=0)
        return model

    return build_engine(
        build,
        Training.model_validate({"zero_stage": stage, "precision": precision, "trains": trains}),
        world_size=1,
        random_weights=True,
    )


def make_block(source: int = 32, target: int = 16) -> Block:
    """Four questions of these lengths, in page-locked memory."""
    tensors = {
        "input_ids": torch.ones(4, source, dtype=torch.long).index_fill(1, torch.arange(8), 0),  # places of a picture
        "attention_mask": torch.ones(4, source, dtype=torch.long),
        "labels": torch.ones(4, target, dtype=torch.long),
        "decoder_input_ids": torch.ones(4, target, dtype=torch.long),
        "vision_features": torch.zeros(4, 9, 64),
        "vision_mask": torch.ones(4, 9, dtype=torch.bool),
    }
    return Block(tensors, ("q",) * 4).pin_memory()
