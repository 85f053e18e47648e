"""The model that ``generation.py`` measures with: a plain T5 of the small size, trained for some minutes and stored.

It is trained on the short pairs of the data set, so that it writes words and ends its texts. It has no bridge for
pictures, so that every program beside ours opens the same folder as it is.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from peers.environments import cache_folder
from peers.protocol import made_once
from transformers import T5Config, T5ForConditionalGeneration

from mmcot.texts.encoding import EncodedPair, collate, encode_pair
from mmcot.texts.tokenizer import open_tokenizer, train_tokenizer

MAX_NEW_TOKENS, MAX_SOURCE_TOKENS = 256, 512
TextPair = tuple[str, str]  # a source and its target


def trained_model(texts: Sequence[TextPair], steps: int, folder: Path | None = None) -> Path:
    """The folder of the model of these texts; trained for so many steps where it does not exist yet.

    The default folder is in the cache, by the texts and the steps, so another data set has another model.
    """
    key = hashlib.sha256(json.dumps([list(texts), steps]).encode()).hexdigest()[:12]
    folder = folder or cache_folder() / "models" / f"t5-small-{key}"
    return made_once(folder, lambda unfinished: train(texts, unfinished, steps))


def encode(texts: Sequence[TextPair], folder: Path) -> list[EncodedPair]:
    """The texts as ids, by the tokenizer in the model's folder."""
    tokenizer = open_tokenizer(folder)
    return [
        encode_pair(tokenizer, *pair, max_source_tokens=MAX_SOURCE_TOKENS, max_target_tokens=MAX_NEW_TOKENS)
        for pair in texts
    ]


def train(texts: Sequence[TextPair], folder: Path, steps: int) -> None:
    """Fit the model to the short pairs of the texts and save it with a tokenizer of 8000 pieces."""
    tokenizer = train_tokenizer((text for pair in texts for text in pair), folder, vocab_size=8000)
    short = [pair for pair in encode(texts, folder) if len(pair.source_ids) <= 64 and 8 <= len(pair.target_ids) <= 48]
    model, chance, started = new_model(len(tokenizer)).train(), random.Random(0), time.process_time()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for step in range(steps):
        chosen = sorted(chance.sample(short, 16), key=lambda pair: len(pair.target_ids))[8 * (step % 2) :][:8]
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, (step + 1) / 50)
        loss = model(**collate(chosen, [None] * len(chosen), feature_shape=(1, 1), pad_token_id=0)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            took = time.process_time() - started
            print(f"step {step} of {steps}, loss {loss.item():.2f}, {len(short)} pairs, {took:.0f} s", flush=True)
    model.eval().save_pretrained(folder)


def new_model(vocab_size: int) -> T5ForConditionalGeneration:
    """T5-small's shape with random weights of seed 0."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=vocab_size,
        d_model=512,
        d_ff=2048,
        num_layers=6,
        num_heads=8,
        d_kv=64,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    return T5ForConditionalGeneration(config)
