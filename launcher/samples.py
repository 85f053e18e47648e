"""What a stage reads: shards, prompts, rationales and tokenizer, joined by qid.

``StageSamples`` turns a sample number into token ids and features, and a block of them
into a batch. Training, validation and generation read through the same object.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from data_shards.index import ShardError
from data_shards.plan import Plan
from data_shards.rationales import read_rationales
from data_shards.storage import committing, fingerprint, read_json
from data_shards.stream import SplitReader
from launcher.config import Settings
from mmcot.encoding import EncodedPair, collate, encode_pair
from mmcot.problem import Problem
from mmcot.prompts import build_pair, gold_rationale, split_format


@dataclasses.dataclass(frozen=True, slots=True)
class Block:
    """A micro-batch: its tensors (see ``mmcot.encoding.collate``) and whose they are; a dummy is nobody's."""

    tensors: dict[str, torch.Tensor]
    qids: tuple[str, ...]

    @property
    def labels(self) -> torch.Tensor:
        return self.tensors["labels"]


class StageSamples:
    """One split as a stage sees it.

    Args:
        rationales: text by qid for a format that reads one; None otherwise.
    """

    def __init__(
        self,
        reader: SplitReader,
        tokenizer: PreTrainedTokenizerBase,
        *,
        format: str,
        use_caption: bool,
        max_source_tokens: int,
        max_target_tokens: int,
        rationales: Mapping[str, str] | None = None,
    ) -> None:
        self.reader, self.tokenizer = reader, tokenizer
        self.format, self.use_caption = format, use_caption
        self.max_source_tokens, self.max_target_tokens = max_source_tokens, max_target_tokens
        self.rationales = rationales

    def __len__(self) -> int:
        return len(self.reader)

    def encode(self, problem: Problem) -> EncodedPair:
        """Prompt and target of a question as token ids."""
        rationale = None
        if self.rationales is not None:
            if problem.qid not in self.rationales:
                raise ShardError(f"question {problem.qid} of split {self.reader.split!r} has no rationale; run `mmcot rationales`")
            rationale = self.rationales[problem.qid]
        source, target = build_pair(problem, self.format, use_caption=self.use_caption, rationale=rationale)
        return encode_pair(
            self.tokenizer, source, target,
            max_source_tokens=self.max_source_tokens, max_target_tokens=self.max_target_tokens,
        )  # fmt: skip

    def load_block(self, samples: np.ndarray, is_dummy: bool = False) -> Block:
        """Read and collate a block of samples."""
        problems = [self.reader.problem(sample) for sample in samples]
        tensors = collate(
            [self.encode(problem) for problem in problems],
            [self.reader.features(sample) for sample in samples],
            feature_shape=self.reader.feature_shape,
            pad_token_id=self.tokenizer.pad_token_id,
            is_dummy=is_dummy,
        )
        return Block(tensors, () if is_dummy else tuple(problem.qid for problem in problems))

    def lengths(self) -> dict[str, np.ndarray]:
        """Token counts of every sample, int32 [N]: source, target, source_cut, target_cut."""
        pairs = [self.encode(self.reader.problem(sample)) for sample in range(len(self))]
        columns = {
            "source": [len(pair.source_ids) for pair in pairs],
            "target": [len(pair.target_ids) for pair in pairs],
            "source_cut": [pair.source_cut for pair in pairs],
            "target_cut": [pair.target_cut for pair in pairs],
        }
        return {name: np.asarray(values, dtype=np.int32) for name, values in columns.items()}


def load_tokenizer(settings: Settings, shards_dir: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of the pretrained model, or the one trained beside the shards."""
    return AutoTokenizer.from_pretrained(settings.model.pretrained or Path(shards_dir) / "tokenizer")


def open_stage(
    settings: Settings,
    stage: str,
    split: str,
    *,
    shards_dir: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    rationales_dir: str | Path | None,
) -> StageSamples:
    """Open one split for the stage "rationale" or "answer"."""
    spec = getattr(settings, stage)
    reader = SplitReader(shards_dir, split, features=settings.data.features)
    rationales = None
    if "G" in split_format(spec.format)[0]:
        if split == "train" and settings.answer.rationale_source == "gold":
            problems = (reader.problem(sample) for sample in range(len(reader)))
            rationales = {problem.qid: gold_rationale(problem, settings.rationale.format) for problem in problems}
        elif rationales_dir is None:
            raise ShardError(f"format {spec.format} reads rationales; give the folder that holds them")
        else:
            rationales = read_rationales(rationales_dir, split)
    return StageSamples(
        reader, tokenizer,
        format=spec.format, use_caption=settings.data.use_caption, rationales=rationales,
        max_source_tokens=spec.max_source_tokens, max_target_tokens=spec.max_target_tokens,
    )  # fmt: skip


def make_plan(
    settings: Settings, lengths: Mapping[str, np.ndarray], shard_of_sample: np.ndarray, *, epoch: int
) -> Plan:
    """The plan of an epoch: the driver counts steps by it, every rank trains by it."""
    training = settings.training
    return Plan(
        lengths["source"], lengths["target"], shard_of_sample,
        seed=settings.run.seed, epoch=epoch,
        global_batch_size=training.global_batch_size, micro_batch_size=training.micro_batch_size,
        window_shards=training.window_shards, group_by_length=training.group_by_length,
    )  # fmt: skip


def cached_lengths(samples: StageSamples, cache_dir: str | Path, inputs: dict) -> dict[str, np.ndarray]:
    """The lengths of all samples, computed once for these ``inputs`` (anything they depend on)."""
    path = Path(cache_dir) / f"{fingerprint(inputs)}.npz"
    if not path.exists():
        with committing(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **samples.lengths())
    with np.load(path, allow_pickle=False) as stored:
        return dict(stored)


def tokenizer_fingerprint(settings: Settings, shards_dir: str | Path) -> str:
    """Names the tokenizer: its id, or the content of the trained one."""
    if settings.model.pretrained:
        return settings.model.pretrained
    return fingerprint(read_json(Path(shards_dir) / "tokenizer" / "tokenizer.json"))
