"""The samples of a stage: shards, prompts, rationales and tokenizer, joined by qid.

``StageSamples`` maps a sample number to token ids and features, and a block of numbers to a
batch. Training, validation and generation use the same class.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import cast

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from data_shards.errors import ShardError
from data_shards.mirror import local_folder
from data_shards.rationale_reader import RationaleReader
from data_shards.reader import SplitReader
from data_shards.shard_files import RemoteAccess
from launcher.config.settings import Settings
from mmcot.models.bridge_names import tokens_of_picture
from mmcot.texts.encoding import EncodedPair, PictureTokens, collate, encode_pair
from mmcot.texts.prompts import build_pair, split_format
from mmcot.texts.sample import Sample
from mmcot.texts.tokenizer import open_tokenizer

GPU_LENGTH_MULTIPLE = 8
GRAPH_LENGTH_MULTIPLE = 16  # of a training with CUDA graphs, so that there are fewer shapes


@dataclasses.dataclass(frozen=True, slots=True)
class Block:
    """A micro-batch: its tensors (see ``mmcot.texts.encoding.collate``) and its question ids; a dummy has none."""

    tensors: dict[str, torch.Tensor]
    qids: tuple[str, ...]

    def pin_memory(self) -> Block:
        """The same block in page-locked memory."""
        return Block({name: tensor.pin_memory() for name, tensor in self.tensors.items()}, self.qids)

    @property
    def labels(self) -> torch.Tensor:
        """The target token ids, int64 [B, T]."""
        return self.tensors["labels"]


class StageSamples:
    """One split in the form of a stage.

    Args:
        rationale_of: maps (sample number, problem) to its rationale, for a format that reads one; None otherwise.
        permute_seed: seed of the order of a question's choices in an epoch; None keeps the given order.
        caption_dropout: the share of epochs in which a question is without its caption, and the seed of which they are.
        pictures: the tokens of pictures in a source; None: pictures are not in the source.
        pretrained: the pretrained model of a training, whose configuration has the decoder's start token; it is read
            when the first block is loaded. None: the padding token is the start token.
        length_multiple: lengths of a block are multiples of it.
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
        rationale_of: Callable[[int, Sample], str] | None = None,
        permute_seed: int | None = None,
        caption_dropout: tuple[float, int] = (0.0, 0),
        pictures: PictureTokens | None = None,
        pretrained: str | None = None,
        length_multiple: int = 1,
    ) -> None:
        self.reader, self.tokenizer = reader, tokenizer
        self.format, self.use_caption = format, use_caption
        self.max_source_tokens, self.max_target_tokens = max_source_tokens, max_target_tokens
        self.rationale_of = rationale_of
        self.permute_seed, self.caption_dropout, self.pictures = permute_seed, caption_dropout, pictures
        self._pretrained, self._length_multiple = pretrained, length_multiple
        self.is_remote = reader.is_remote

    def __len__(self) -> int:
        return len(self.reader)

    @property
    def bytes_read(self) -> int:
        """Bytes read so far."""
        return self.reader.bytes_read

    @property
    def bytes_needed(self) -> int:
        """Bytes of them that were used."""
        return self.reader.bytes_needed

    def prefetch(self, samples: np.ndarray) -> None:
        """Start fetching samples that will be loaded."""
        self.reader.prefetch(samples)

    def encode(self, sample: int, epoch: int | None = None) -> EncodedPair:
        """Encode prompt and target of a question as token ids; an epoch may permute choices and leave out a caption."""
        problem = self.reader.problem(sample)
        if epoch is not None and self.permute_seed is not None:
            problem = with_permuted_choices(problem, seed=self.permute_seed, epoch=epoch)
        rationale = self.rationale_of(sample, problem) if self.rationale_of else None
        source, target = build_pair(
            problem,
            self.format,
            use_caption=self.use_caption and not self._is_without_caption(problem, epoch),
            rationale=rationale,
            marks_pictures=self.pictures is not None,
        )
        return encode_pair(
            self.tokenizer,
            source,
            target,
            max_source_tokens=self.max_source_tokens,
            max_target_tokens=self.max_target_tokens,
            pictures=self.pictures,
        )

    def _is_without_caption(self, problem: Sample, epoch: int | None) -> bool:
        share, seed = self.caption_dropout
        return epoch is not None and random.Random(f"caption-{seed}-{problem.qid}-{epoch}").random() < share

    def read(self, sample: int, epoch: int | None = None) -> tuple[EncodedPair, np.ndarray | None]:
        """Read a sample as ``encode`` returns it, and its features.

        Raises:
            ShardError: there are more pictures in its features than places in its text, or in a document fewer.
        """
        pair, features = self.encode(sample, epoch), self.reader.features(sample)
        self._check_pictures(sample, pair, features)
        return pair, features

    def _check_pictures(self, sample: int, pair: EncodedPair, features: np.ndarray | None) -> None:
        """Check that the source has a place for each picture of the features, and in a document the reverse.

        Another sample may have fewer: pictures that could not be read are counted where features are made.
        """
        if self.pictures is None or features is None or pair.source_cut:
            return
        num_places = pair.source_ids.count(self.pictures.token_id) // self.pictures.per_picture
        num_pictures = len(features) * self.pictures.max_pictures // self.reader.feature_shape[0]
        is_document = num_places > num_pictures and self.reader.problem(sample).kind == "document"
        if num_pictures > num_places or is_document:
            raise ShardError(
                f"{self.reader.split}, sample {self.reader.qid(sample)}: its text has {num_places} pictures, its "
                f"features are of {num_pictures}; a picture needs its place in the sample (its images, or a picture in "
                "a document) and its features: build the features again, or correct the sample"
            )

    def others(self, samples: np.ndarray) -> np.ndarray:
        """The samples whose pictures ``features_of_another`` tries first: those half the split away."""
        return (samples + len(self) // 2) % len(self)

    def features_of_another(self, sample: int, own: np.ndarray | None) -> np.ndarray | None:
        """Read the features of another sample of the split with as many pictures; ``own`` where there is none.

        Those of the next sample from half the split on, so that neighbours have different ones.
        """
        if own is None or not len(own):
            return own
        for step in range(len(self) - 1):
            other = self.reader.features(int(self.others(np.array(sample + step))))
            if other is not None and len(other) == len(own) and not np.array_equal(other, own):
                return other
        return own

    @cached_property
    def _decoder_start_token_id(self) -> int:
        config = (
            PretrainedConfig.get_config_dict(self._pretrained, trust_remote_code=False)[0] if self._pretrained else {}
        )
        return config.get("decoder_start_token_id", self.tokenizer.pad_token_id)

    def load_block(self, samples: np.ndarray, is_dummy: bool = False, epoch: int | None = None) -> Block:
        """Read and collate a block of samples; without an epoch their choices have the given order."""
        read = [self.read(sample, epoch) for sample in samples]
        tensors = collate(
            [pair for pair, _ in read],
            [features for _, features in read],
            feature_shape=self.reader.feature_shape,
            pad_token_id=cast(int, self.tokenizer.pad_token_id),
            decoder_start_token_id=self._decoder_start_token_id,
            is_dummy=is_dummy,
            length_multiple=self._length_multiple,
        )
        return Block(tensors, () if is_dummy else tuple(self.reader.qid(sample) for sample in samples))


def load_tokenizer(settings: Settings, shards_dir: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the pretrained model, or the trained one of the data folder."""
    return open_tokenizer(settings.model.pretrained or _local(settings, shards_dir) / "tokenizer")


def open_stage(
    settings: Settings,
    stage: str,
    split: str,
    *,
    shards_dir: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, str | Path] = MappingProxyType({}),
    for_training: bool = False,
) -> StageSamples:
    """Open one split for a stage.

    Args:
        for_training: the training split of a stage that trains on gold texts has those, instead of written ones.
        shards_dir: folder or URL of the data folder.
        texts: the folders of the texts that the stage reads, by their names.
    """
    spec, data = settings.stage(stage), settings.data
    access = RemoteAccess(data.remote, data.cache_dir, int(data.cache_gb * 1e9))
    reader = SplitReader(_local(settings, shards_dir), split, features=data.features, access=access)
    rationale_of = None
    if "G" in split_format(spec.format)[0]:
        gold = for_training and split == "train" and settings.trains_on_gold(stage)
        rationale_of = _texts_of(settings, stage, split, reader, texts, gold=gold)
    return StageSamples(
        reader,
        tokenizer,
        format=spec.format,
        use_caption=data.use_caption,
        rationale_of=rationale_of,
        max_source_tokens=spec.max_source_tokens,
        max_target_tokens=spec.max_target_tokens,
        permute_seed=settings.run.seed if data.permute_choices and split == "train" else None,
        caption_dropout=(data.caption_dropout if split == "train" else 0.0, settings.run.seed),
        pictures=pictures_in_source(settings, reader.feature_shape, cast(int, tokenizer.pad_token_id)),
        pretrained=settings.model.pretrained,
        length_multiple=_length_multiple(settings, for_training),
    )


def pictures_in_source(settings: Settings, feature_shape: tuple[int, int], pad_token_id: int) -> PictureTokens | None:
    """How pictures stand in the sources of these settings; None where they do not, as in text alone."""
    return picture_tokens(settings, feature_shape, pad_token_id) if settings.model.inject == "embed" else None


def picture_tokens(settings: Settings, feature_shape: tuple[int, int], pad_token_id: int) -> PictureTokens | None:
    """The media tokens of pictures; None where a model has none."""
    model, most = settings.model, settings.data.max_pictures
    if model.inject == "encoder" or settings.data.features is None:
        return None
    num_patches, rest = divmod(feature_shape[0], most)
    if rest:  # of one pooled vector for all pictures
        num_patches, most = feature_shape[0], 1
    per_picture = tokens_of_picture(model.resample, num_patches=num_patches, media_tokens=model.media_tokens)
    return PictureTokens(per_picture, pad_token_id, most)


def _length_multiple(settings: Settings, for_training: bool) -> int:
    if settings.cluster.use_gpu is not True:
        return 1
    return GRAPH_LENGTH_MULTIPLE if for_training and settings.training.cuda_graphs else GPU_LENGTH_MULTIPLE


def with_permuted_choices(problem: Sample, *, seed: int, epoch: int) -> Sample:
    """Return the question with its choices in a random order that depends on seed, qid and epoch alone."""
    order = list(range(len(problem.choices)))
    random.Random(f"{seed}-{problem.qid}-{epoch}").shuffle(order)
    return problem.with_choices_in_order(order)


def _local(settings: Settings, shards_dir: str | Path) -> Path:
    return local_folder(shards_dir, settings.data.cache_dir, features=settings.data.features)


def _texts_of(
    settings: Settings, stage: str, split: str, reader: SplitReader, texts: Mapping[str, str | Path], *, gold: bool
) -> Callable[[int, Sample], str]:
    """The function from a sample to the texts that a stage reads, joined with spaces: gold ones, or written ones."""
    chain = settings.chain
    names = chain.stage(stage).reads
    if gold:
        return partial(_gold_texts, settings, names)
    if not names or not texts.keys() >= set(names):
        raise ShardError(f"format {settings.stage(stage).format} reads rationales; give the folder that holds them")
    readers = [RationaleReader(texts[name], split, field=chain.field_of(name)) for name in names]
    return partial(_written_texts, reader, readers)


def _gold_texts(settings: Settings, names: Sequence[str], sample: int, problem: Sample) -> str:
    return " ".join(settings.gold_text(name, problem) for name in names)


def _written_texts(reader: SplitReader, readers: Sequence[RationaleReader], sample: int, problem: Sample) -> str:
    return " ".join(each.text(*reader.place(sample), problem.qid) for each in readers)
