"""Training a tokenizer on the texts of a data set, and opening one."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mmcot.errors import InputError
from mmcot.pretrained import opening

_PROBE = "".join(map(chr, range(32, 127))) + "\n\u00e9"  # has every kind of token once
PAD_TOKEN, EOS_TOKEN = "<pad>", "</s>"  # ids 0 and 1, as T5 has them


def train_tokenizer(texts: Iterable[str], output_dir: str | Path, *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on texts and save it as a transformers tokenizer.

    It encodes any text without loss; a frequent word becomes one token. The vocabulary is smaller
    than ``vocab_size`` where the texts do not contain that many different pieces.

    Raises:
        ValueError: there is no text.
    """
    texts = list(texts)
    if not texts:
        raise InputError("there is no text to train a tokenizer on; give the training split some questions")
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[PAD_TOKEN, EOS_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS_TOKEN}", special_tokens=[(EOS_TOKEN, tokenizer.token_to_id(EOS_TOKEN))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD_TOKEN, eos_token=EOS_TOKEN, clean_up_tokenization_spaces=False
    )
    fast.save_pretrained(output_dir)
    return fast


def open_tokenizer(name: str | Path) -> Any:
    """Open the tokenizer of a folder or of a Hugging Face id; code that comes with it is never run.

    Raises:
        InputError: it cannot be opened, or needs code of its own.
    """
    with opening(name, "the tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        tokenizer(_PROBE)  # some damage is found by its use alone
    return tokenizer
