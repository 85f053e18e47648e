"""Every setting with its unit and its default, defined in this module alone.

    settings = load_settings(preset="demo", overrides=["training.learning_rate=1e-3"])     # launcher/config/loading.py
    settings.training.learning_rate

The packages ``mmcot`` and ``data_shards`` take no ``Settings``: the launcher passes plain arguments to them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from data_shards.sources.columns import check_columns
from data_shards.sources.forms import form_labels
from launcher.config.chains import ANSWER, MATCHING, PRETRAINED, RATIONALE, Chain, Stage, chain_named
from launcher.config.extensions import load_extensions
from mmcot.errors import InputError
from mmcot.models.bridge_names import RESAMPLER_NAMES, check_bridge
from mmcot.texts.prompts import gold_rationale, split_format
from mmcot.texts.sample import Sample
from mmcot.vision.encoder_kinds import ENCODERS
from mmcot.vision.patches import PICTURE_SIZE, SQUARE_SIZE

SPACE_KINDS = ("loguniform", "uniform", "randint", "choice", "grid")  # of values in tuning.space


class SettingsError(InputError):
    """Settings that are not valid; the message lists every wrong one with its remedy."""


class _Section(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Run(_Section):
    """Name, folder, seed and chain of a run."""

    name: str = Field(
        default="run", pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]*$", description="name of the run; MLflow shows it"
    )
    dir: str | None = Field(
        default=None,
        description="folder of the run; default runs/<name>, of a tuning runs/<name>-tune, of an ablation "
        "runs/<name>-arms",
    )
    seed: NonNegativeInt = Field(default=0, description="seed of weights, order and dropout")
    chain: str = Field(
        default="two-stage",
        description="what is trained: two-stage (first the rationale and then the answer), given-rationales (the "
        "answer with those of answer.rationales), reason-then-answer or answer-then-explain (one model for both), "
        "answer (the answer alone), match-first (BLIP-2: a Q-Former first learns which pictures and texts belong "
        "together) or align-first (LLaVA: the bridge first learns to write captions, then all to answer)",
    )

    @pydantic.field_validator("chain")
    @classmethod
    def _known_chain(cls, name: str) -> str:
        return chain_named(name).name


class MiniSQA(_Section):
    """Sizes and form of the built-in data set."""

    num_train: PositiveInt = Field(default=4000, description="training questions")
    num_val: PositiveInt = Field(default=400, description="validation questions")
    num_test: PositiveInt = Field(default=800, description="test questions")
    seed: NonNegativeInt = Field(default=0, description="seed of the generator")
    shuffle_choices: bool = Field(
        default=True, description="shuffle the choices of each question, instead of one order for each skill"
    )
    extra_choices: NonNegativeInt = Field(
        default=1,
        le=3,
        description="maximum number of choices from other skills, in addition to the skill's own; none is twice as "
        "likely as each other number",
    )
    form: Literal["choices", "free", "captions", "episodes"] = Field(
        default="choices",
        description="what is drawn: questions with choices, the same questions with free answers, pictures with their "
        "captions, or documents (episodes) of pictures with new words, whose last word is to be written",
    )
    skills: list[str] | None = Field(
        default=None,
        description="names of the skills to draw, such as [magnets, map], in equal shares; null: all (with captions: "
        "all with a picture)",
    )
    telling_captions: bool = Field(
        default=False, description="every caption states the fact that its picture shows, instead of one in ten"
    )

    @property
    def arguments(self) -> dict[str, Any]:
        """What determines the data; settings of later versions only where they are set, so that folders keep names."""
        later = {"form", "skills", "telling_captions"}
        return self.model_dump(exclude=later) | self.model_dump(include=later, exclude_defaults=True)

    @pydantic.model_validator(mode="after")
    def _known_skills(self) -> MiniSQA:
        if self.skills or self.form == "episodes":
            from data_shards.mini_sqa.generate import chosen_skills

            chosen_skills(self.form, self.skills, telling_captions=self.telling_captions)
        return self

    @pydantic.model_validator(mode="before")
    @classmethod
    def _of_before_extra_choices(cls, values: Any) -> Any:
        """Complete settings of an earlier version without ``extra_choices`` describe data without extra choices."""
        if isinstance(values, dict) and set(values) == {"num_train", "num_val", "num_test", "seed", "shuffle_choices"}:
            return values | {"extra_choices": 0}
        return values


class Data(_Section):
    """The data set, its shards and its features."""

    path: str | None = Field(
        default=None,
        description=f"the data set ({form_labels()}, or hf://org/name of the Hugging Face Hub, with "
        "@revision and :config); null: the built-in MiniSQA",
    )
    mini_sqa: MiniSQA = MiniSQA()
    shards_dir: str | None = Field(
        default=None,
        description="folder of the shards, or the URL of a finished one (s3, gs, http, hf); default "
        "data/<name>-<fingerprint>",
    )
    remote: Literal["cache", "ranges"] = Field(
        default="cache",
        description="remote shards: cache them whole on each machine, or read only the needed bytes and store nothing",
    )
    cache_dir: str = Field(default="~/.cache/mmcot", description="folder of cached remote shards and indexes")
    cache_gb: PositiveFloat = Field(
        default=50.0,
        description="size of the cache on a machine in gigabytes; the least recently used are removed first",
    )
    samples_per_shard: PositiveInt = Field(default=512, description="questions per shard")
    features: str | None = Field(
        default="patch",
        description=f"vision features to train on: {', '.join(ENCODERS)}, or the name of finished ones; null: text "
        "alone",
    )
    vision_features: str | None = Field(
        default=None,
        description="folder of published features and their name_map.json; null: data.path/vision_features",
    )
    vision_model: str | None = Field(
        default=None,
        description="Hugging Face id or folder of the encoder that makes the features of the pictures "
        f"({', '.join(name for name, encoder in ENCODERS.items() if encoder.default_model)}); null: published features "
        "if data.path has them, else the kind's default encoder",
    )
    picture_size: PositiveInt = Field(
        default=PICTURE_SIZE, description="features patch: side in pixels to which pictures are resized"
    )
    square_size: PositiveInt = Field(
        default=SQUARE_SIZE,
        description="features patch: side of a square in pixels; a picture has (picture_size / square_size)^2 of them",
    )
    max_pictures: PositiveInt = Field(
        default=1, description="maximum number of pictures per question; further ones are counted"
    )
    unreadable_pictures: Literal["fail", "count"] = Field(
        default="fail", description="a picture that cannot be read: stop with an error, or count it and continue"
    )
    unanswered: Literal["refuse", "leave-out"] = Field(
        default="refuse",
        description="training questions without an answer: stop with an error that names them, or leave them out and "
        "count them; those of val and test are left out and counted",
    )
    captions: str | None = Field(
        default=None,
        description="a captions.json to use instead of the data set's own, such as `mmcot data caption` writes",
    )
    columns: dict[str, str] = Field(
        default={},
        description="columns of the data set whose fields have other names, such as {question: text, answer: label}; "
        "for tables and Hugging Face data sets",
    )
    splits: dict[Literal["train", "val", "test"], str] = Field(
        default={}, description="lists of pid_splits.json to use as splits, such as {train: minitrain}"
    )
    permute_choices: bool = Field(
        default=False,
        description="permute the choices of a training question in every epoch; not for rationales that name letters",
    )
    use_caption: bool = Field(default=False, description="put the picture's caption into the context")
    caption_dropout: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="with use_caption: leave the caption of a training question out of this share of its epochs, so "
        "that the model reads questions with and without one",
    )
    tokenizer_vocab_size: PositiveInt = Field(default=2000, description="pieces of the tokenizer trained on the text")

    @property
    def mini_sqa_arguments(self) -> dict[str, Any]:
        """The arguments of ``write_mini_sqa``: episodes have as many pictures as are read."""
        if self.mini_sqa.form != "episodes":
            return self.mini_sqa.arguments
        from data_shards.mini_sqa.episodes import most_shots

        return self.mini_sqa.arguments | {"max_shots": most_shots(self.max_pictures)}

    @pydantic.field_validator("columns")
    @classmethod
    def _known_fields(cls, columns: dict[str, str]) -> dict[str, str]:
        check_columns(columns)
        return columns

    @property
    def patch_sizes(self) -> str | None:
        """Sizes of picture and square for features of the kind ``patch``, such as "128/16"; None for the default."""
        sizes = self.picture_size, self.square_size
        return None if sizes == (PICTURE_SIZE, SQUARE_SIZE) else "/".join(map(str, sizes))

    @pydantic.model_validator(mode="after")
    def _squares_fit(self) -> Data:
        if self.picture_size % self.square_size:
            nearest = max(1, round(self.picture_size / self.square_size)) * self.square_size
            raise ValueError(
                f"picture_size ({self.picture_size}) must be a multiple of square_size ({self.square_size}); try "
                f"{nearest}"
            )
        if self.patch_sizes and self.features != "patch":
            raise ValueError(
                f"picture_size and square_size ({self.patch_sizes}) are of the features patch, and data.features is "
                f"{self.features}; leave them out"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _dropped_captions_are_used(self) -> Data:
        if self.caption_dropout and not self.use_caption:
            raise ValueError(
                f"caption_dropout ({self.caption_dropout:g}) leaves out captions that nothing reads; set "
                "data.use_caption=true, or caption_dropout to 0"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _episodes_fit(self) -> Data:
        if self.path is None:
            _ = self.mini_sqa_arguments
            if self.columns:
                raise ValueError(
                    f"columns ({', '.join(self.columns)}) are those of data.path, which is not given; set it, or leave "
                    "data.columns out"
                )
        return self

    def require_features(self) -> str:
        """Return ``features`` for code that needs some.

        Raises:
            SettingsError: there are none.
        """
        if self.features is None:
            raise SettingsError("data.features is null, and vision features are needed; set it, such as to patch")
        return self.features


class T5Shape(_Section):
    """Size and attention start of a T5 with random weights."""

    vocab_size: PositiveInt | None = Field(
        default=None, description="rows of the embedding; null: the tokenizer's size"
    )
    d_model: PositiveInt = Field(default=64, description="width of the states")
    d_kv: PositiveInt = Field(default=16, description="width of an attention head")
    d_ff: PositiveInt = Field(default=256, description="width of the feed-forward layers")
    num_layers: PositiveInt = Field(default=2, description="layers of the encoder and of the decoder")
    num_heads: PositiveInt = Field(default=4, description="attention heads")
    feed_forward_proj: Literal["relu", "gated-gelu"] = Field(default="relu", description="T5 v1.0 or Flan style")
    tie_word_embeddings: bool = Field(default=False, description="share lm_head with the input embedding")
    dropout_rate: float = Field(default=0.0, ge=0, lt=1, description="dropout")
    distance_bias: float = Field(
        default=0.0,
        ge=0,
        description="start the first head's attention lower by this much a token of distance, each further head by "
        "half of it (ALiBi); 0: T5's start",
    )
    near_bias: float = Field(
        default=0.0,
        ge=0,
        description="start half of the encoder's heads looking one, two, ... tokens back: their attention falls by "
        "this much a token from there",
    )
    match_score: float = Field(
        default=0.0,
        ge=0,
        description="start the other half looking at equal tokens, which score this much; near_bias and match_score "
        "go together, 0: T5's start",
    )

    @property
    def for_config(self) -> dict[str, Any]:
        """The fields of a T5 configuration: all but the initialisation of attention."""
        return self.model_dump(exclude={"distance_bias", "near_bias", "match_score"})

    @pydantic.model_validator(mode="after")
    def _one_start(self) -> T5Shape:
        if (self.near_bias > 0) != (self.match_score > 0):
            raise ValueError(
                f"near_bias ({self.near_bias:g}) and match_score ({self.match_score:g}) go together; set both, such "
                "as 8 and 24, or none"
            )
        if self.near_bias and self.distance_bias:
            raise ValueError("distance_bias and near_bias start the same attention in two ways; set one of them to 0")
        return self


class Model(_Section):
    """The backbone and its fusion."""

    pretrained: str | None = Field(default=None, description="Hugging Face id or folder of a T5; null: random weights")
    shape: T5Shape = Field(default=T5Shape(), description="size of a model with random weights")
    fusion: Annotated[str, pydantic.AfterValidator(check_bridge)] = Field(
        default="gated_cross_attention",
        description="how picture features are combined with text states: a name in BRIDGES of mmcot/models/fusion.py",
    )
    gate_start: float = Field(
        default=0.0,
        description="bias of the fusion's gate before training: 0 opens it half, -4 nearly closes it; loaded fusions "
        "keep theirs",
    )
    mask_absent_patches: bool = Field(
        default=False, description="mask the zeros of a missing picture in the fusion; off: attended, as published"
    )

    inject: Literal["encoder", "embed", "layers"] = Field(
        default="encoder",
        description="where pictures enter: encoder (model.fusion, after the encoder), embed (media tokens in the "
        "source, in place of <image>) or layers (gated cross-attention to media before each block of the decoder)",
    )
    resample: str = Field(
        default="none",
        description="how features of a picture become media tokens: none, which is model.fusion's, or linear, mean, "
        "pool, perceiver, qformer, vit",
    )
    media_tokens: PositiveInt = Field(
        default=16, description="media tokens of a picture; linear has one for each patch instead"
    )
    resample_depth: PositiveInt = Field(default=2, description="layers of linear, perceiver, qformer and vit")
    resample_heads: PositiveInt = Field(default=4, description="attention heads of the resampler")
    resample_width: PositiveInt | None = Field(
        default=None,
        description="width of the resampler, whose media then pass a linear layer to the model's; null: the model's",
    )
    resample_head_width: PositiveInt | None = Field(
        default=None, description="width of each of resample_heads; null: the resampler's width divided among them"
    )
    resample_activation: Literal["gelu", "relu", "squared_relu"] = Field(
        default="gelu",
        description="activation in the feed-forward of perceiver, qformer, vit and the gated layers: gelu (BLIP-2, "
        "OpenFlamingo), relu (IDEFICS) or squared_relu (Flamingo's paper)",
    )
    resample_qk_norm: bool = Field(
        default=False, description="layer norm of queries and keys in the resampler's attention, as in IDEFICS"
    )
    lora_rank: PositiveInt = Field(default=8, description="with trains lora: rank of the adapters")
    lora_alpha: PositiveFloat = Field(
        default=16.0, description="with trains lora: the adapters' output is scaled by lora_alpha / lora_rank"
    )
    lora_dropout: float = Field(default=0.0, ge=0, lt=1, description="with trains lora: dropout of an adapter's input")
    lora_targets: list[str] = Field(
        default=["q", "v"],
        min_length=1,
        description="with trains lora: the language model's linear layers that get an adapter, by the ends of their "
        "names; T5 has q, k, v, o, wo, and wi (v1.1 and Flan: wi_0, wi_1)",
    )
    projection_width: PositiveInt = Field(
        default=32,
        description="width of the vectors of pictures and texts that a matching stage compares; 256 in BLIP-2",
    )

    def fixed_by_start(self, vision_dim: int | None) -> dict[str, dict[str, Any]]:
        """What a saved model of ours must have to be started from, for ``check_start``."""
        dim = {} if vision_dim is None else {"vision_dim": vision_dim}
        if self.inject == "encoder":
            return {"shape": {"fusion": self.fusion, **dim}, "media": {}}
        names = [name for name in type(self).model_fields if name.startswith("resample")]
        media = {name: getattr(self, name) for name in names} | dim
        return {
            "shape": {},
            "media": media if self.resample == "linear" else media | {"media_tokens": self.media_tokens},
        }

    @pydantic.model_validator(mode="after")
    def _resample_fits(self) -> Model:
        if self.resample not in RESAMPLER_NAMES:
            raise ValueError(
                f"model.resample {self.resample!r} is unknown; expected one of {', '.join(RESAMPLER_NAMES)}"
            )
        if (self.inject == "encoder") != (self.resample == "none"):
            raise ValueError(
                f"model.inject {self.inject!r} and model.resample {self.resample!r} do not fit: encoder goes with none "
                "(the fusion reads all patches), embed and layers with another, such as perceiver"
            )
        return self


Trained = Literal["all", "bridge", "lora"] | Annotated[list[str], Field(min_length=1)]


class Training(_Section):
    """Optimizer, batches, DeepSpeed, checkpoints and loading."""

    learning_rate: PositiveFloat = Field(default=8e-5, description="peak learning rate of AdamW")
    fusion_learning_rate: PositiveFloat | None = Field(
        default=None, description="peak learning rate of the fusion layers; null: the same"
    )
    trains: Trained | None = Field(
        default=None,
        description="what is trained: all, bridge (the parts that are new to the language model: fusion or resampler), "
        "lora (the bridge, and adapters of the language model), or a list of beginnings of parameter names, such as "
        "[encoder, decoder.block.1]; the rest is frozen; null: all, or with freeze_backbone bridge",
    )
    freeze_backbone: bool = Field(default=False, description="the same as trains bridge")
    warmup_steps: NonNegativeInt = Field(default=0, description="steps of linear warm-up")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        default="linear", description="how the learning rate falls after the warm-up"
    )
    final_lr_fraction: float = Field(default=0.0, ge=0, le=1, description="learning rate at the end over its peak")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW's first beta")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="AdamW's second beta")
    weight_decay: float = Field(default=0.01, ge=0, description="AdamW's weight decay, on matrices only")
    clip_norm: float = Field(default=1.0, ge=0, description="largest gradient norm; 0 clips nothing")
    global_batch_size: PositiveInt = Field(default=8, description="questions per optimizer step, over all workers")
    micro_batch_size: PositiveInt = Field(default=4, description="questions per forward pass of one worker")
    max_tokens_per_block: PositiveInt | None = Field(
        default=None,
        description="tokens per forward pass of one worker, source and target with padding: as many similar questions "
        "as fit, instead of micro_batch_size; global_batch_size is then their mean number per step; null: by questions",
    )
    window_shards: PositiveInt = Field(default=4, description="shards shuffled together")
    group_by_length: bool = Field(default=True, description="make micro-batches of questions with similar lengths")
    loader_processes: NonNegativeInt = Field(
        default=0, description="processes per worker that read and tokenize in advance; 0: a thread"
    )
    zero_stage: Literal["auto", 0, 1, 2, 3] = Field(
        default="auto",
        description="DeepSpeed ZeRO stage; auto: the lowest one whose weights, gradients and optimizer state take at "
        "most half of a device's memory, chosen at the run's first start",
    )
    precision: Literal["fp32", "bf16"] = Field(default="fp32", description="number format of the forward pass")
    tf32: bool = Field(
        default=False,
        description="on GPUs from Ampere on, let matrix products in fp32 round their factors to 10 bits of mantissa: "
        "faster, and results differ in the third digit",
    )
    cuda_graphs: bool = Field(
        default=True,
        description="on GPUs, launch a block's forward and backward pass by one call where that is possible: ZeRO "
        "stages 0 and 1 without offload and activation checkpointing",
    )
    activation_checkpointing: bool = Field(
        default=False, description="compute activations again in the backward pass instead of keeping them"
    )
    offload: Literal["none", "cpu", "nvme"] = Field(
        default="none",
        description="where the optimizer's state is stored (and under ZeRO-3 the weights): the device, main memory, or "
        "nvme_dir",
    )
    nvme_dir: str | None = Field(default=None, description="folder on a local NVMe disk, for offload=nvme")
    deepspeed: str | dict[str, Any] | None = Field(
        default=None,
        description="your own DeepSpeed settings, a JSON file or a mapping, which override ours; batch arithmetic "
        "stays ours",
    )
    checkpoint_every: PositiveInt = Field(default=500, description="steps between checkpoints")
    keep_checkpoints: PositiveInt = Field(default=2, description="checkpoints kept of each stage")
    checkpoint_url: str | None = Field(
        default=None, description="object store for checkpoints (s3://bucket/folder, gs://...); null: the run's folder"
    )
    validate_every: PositiveInt = Field(default=500, description="steps between validation losses")
    export: Literal["last", "best"] = Field(
        default="last",
        description="which model later steps use: that of the last step, or that with the lowest validation loss, "
        "which is kept in <stage>/best in any case",
    )
    early_stopping_patience: PositiveInt | None = Field(
        default=None,
        description="end a training after this many validations in a row without a lower loss; null: never",
    )
    log_every: PositiveInt = Field(default=10, description="steps between logged points")
    profile_steps: tuple[NonNegativeInt, PositiveInt] | None = Field(
        default=None,
        description="first and last step, such as [100, 110], of which every rank writes a trace into logs/ (Perfetto)",
    )
    ledger: bool = Field(
        default=False, description="record the question ids of every step, for `mmcot data ledger RUN`"
    )
    max_failures: NonNegativeInt = Field(default=3, description="lost workers that a training tolerates")
    peak_tflops: PositiveFloat | None = Field(
        default=None,
        description="peak of a worker's device in 10^12 operations per second, for MFU; null: measured at the start",
    )
    hang_timeout_s: PositiveFloat = Field(
        default=600.0, description="seconds without progress after which a rank counts as hung"
    )

    @property
    def trained(self) -> str | list[str]:
        """What is trained: all, bridge, lora, or beginnings of parameter names."""
        return self.trains if self.trains is not None else "bridge" if self.freeze_backbone else "all"

    @pydantic.model_validator(mode="after")
    def _one_choice_of_trained(self) -> Training:
        if self.freeze_backbone and self.trains not in (None, "bridge"):
            raise ValueError(f"freeze_backbone trains the bridge alone, and trains is {self.trains!r}; set one of them")
        return self

    @pydantic.model_validator(mode="after")
    def _batch_divides(self) -> Training:
        if self.global_batch_size % self.micro_batch_size:
            nearest = max(1, (self.global_batch_size + self.micro_batch_size // 2) // self.micro_batch_size)
            raise ValueError(
                f"global_batch_size ({self.global_batch_size}) must be a multiple of micro_batch_size "
                f"({self.micro_batch_size}); try {nearest * self.micro_batch_size}"
            )
        if self.profile_steps and self.profile_steps[0] >= self.profile_steps[1]:
            first, last = self.profile_steps
            raise ValueError(f"profile_steps [{first}, {last}] has no step; give a first one below the last one")
        if self.offload != "none" and self.zero_stage == 0:
            raise ValueError("offload needs a zero_stage of 1, 2 or 3; zero_stage 0 shards nothing that could move")
        if self.offload == "nvme" and (self.nvme_dir is None or self.zero_stage not in ("auto", 3)):
            raise ValueError("offload=nvme needs zero_stage 3 and a folder in nvme_dir")
        if self.zero_stage == 0 and self.precision == "bf16":
            raise ValueError("zero_stage 0 keeps no fp32 copy of bf16 weights and trains differently; use zero_stage 1")
        return self


class StageSettings(_Section):
    """Prompt format, length, limits and optimization of one training."""

    format: str = Field(default="", description="prompt format, such as QCM-E; empty: the chain's own")
    num_steps: PositiveInt | None = Field(default=None, description="optimizer steps; null: num_epochs decides")
    num_epochs: PositiveFloat | None = Field(default=None, description="passes over the training split")
    max_source_tokens: PositiveInt = Field(default=512, description="longest source; truncated ones are counted")
    max_target_tokens: PositiveInt = Field(default=512, description="longest target, in training and in generation")
    gate_start: float | None = Field(
        default=None, description="initial gate bias of this stage; null: model.gate_start"
    )
    learning_rate: PositiveFloat | None = Field(
        default=None, description="peak learning rate of this stage; null: training.learning_rate"
    )
    global_batch_size: PositiveInt | None = Field(
        default=None, description="questions per optimizer step of this stage; null: training.global_batch_size"
    )
    micro_batch_size: PositiveInt | None = Field(
        default=None, description="questions per forward pass of this stage; null: training.micro_batch_size"
    )
    trains: Trained | None = Field(
        default=None, description="what this stage trains; null: what its chain says, else training.trains"
    )

    @pydantic.model_validator(mode="after")
    def _one_length(self) -> StageSettings:
        if (self.num_steps is None) == (self.num_epochs is None):
            raise ValueError("give exactly one of num_steps and num_epochs")
        return self


class RationaleStage(StageSettings):
    """The training of the model that reasons."""

    format: str = Field(default="QCM-E", description="prompt format of stage one")


class ReadingStage(StageSettings):
    """A training whose model may read texts of earlier stages."""

    rationale_source: Literal["generated", "gold"] = Field(
        default="generated", description="texts of earlier stages that this one trains on"
    )
    rationales: str | None = Field(
        default=None, description="with run.chain given-rationales: the folder that `mmcot rationales --out` wrote"
    )


class AnswerStage(ReadingStage):
    """The training of the model that answers."""


class Generation(_Section):
    """Decoding of rationales and answers, and the tasks of workers."""

    batch_size: PositiveInt = Field(default=64, description="questions decoded together")
    task_samples: int = Field(default=256, ge=1, le=256, description="questions per task")
    max_attempts: PositiveInt = Field(default=3, description="attempts of a task before it is quarantined")
    hang_timeout_s: PositiveFloat = Field(
        default=600.0,
        description="seconds without progress (a token, a picture, a megabyte of a model or tar) after which a "
        "worker is replaced; also for features and captions",
    )
    temperature: float = Field(
        default=0.0, ge=0, description="0 is greedy; above, rationales are sampled, seeded by question"
    )
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="draw from the likeliest tokens with this much probability"
    )
    top_k: int = Field(default=0, ge=0, description="draw from this many of the likeliest tokens; 0: from all")
    min_p: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="draw from tokens with at least this share of the likeliest one's probability",
    )
    repetition_penalty: float = Field(
        default=1.0, gt=0, description="above 1, tokens that the text already has become less likely (arXiv:1909.05858)"
    )
    no_repeat_ngram_size: int = Field(
        default=0, ge=0, description="no sequence of this many tokens occurs twice in a text; 0: without this rule"
    )
    min_new_tokens: int = Field(default=0, ge=0, description="a text does not end before it has this many tokens")
    candidates: PositiveInt = Field(
        default=1, description="texts that are sampled for a question, all kept in the file"
    )
    search: Literal["none", "vote"] = Field(
        default="none",
        description="which candidate is the text: none, the first; vote, the likeliest of those with the answer that "
        "most have (arXiv:2203.11171), or with the text that most have where they hold no answer",
    )
    precision: Literal["fp32", "bf16"] = Field(default="fp32", description="number format of the weights in generation")
    other_pictures: bool = Field(
        default=False,
        description="answer the test questions once more with the pictures of other questions, to see how much the "
        "answers depend on them; texts that the answering stage reads stay the same",
    )
    gpus_per_worker: float = Field(
        default=1.0, gt=0, description="GPUs a generation worker takes; a fraction lets several share one"
    )

    @pydantic.model_validator(mode="after")
    def _candidates_differ(self) -> Generation:
        if self.candidates > 1 and self.temperature == 0:
            raise ValueError(
                f"candidates ({self.candidates}) without sampling are all the same text; set generation.temperature "
                "above 0, such as 0.7, or candidates to 1"
            )
        if self.search == "vote" and self.candidates == 1:
            raise ValueError(
                "search vote needs several candidates, and generation.candidates is 1; set it to 2 or more, or search "
                "to none"
            )
        return self


ENV_PREFIXES = ("NCCL_", "GLOO_", "TORCH_", "PYTORCH_", "CUDA_", "UCX_", "FI_", "OMP_", "MKL_")


class Cluster(_Section):
    """Ray, its workers and their devices."""

    address: str = Field(default="local", description="Ray to join: 'local' starts one, 'auto' or host:port joins it")
    num_workers: PositiveInt = Field(default=2, description="training and generation workers")
    min_workers: PositiveInt | None = Field(
        default=None,
        description="continue with at least this many when workers or nodes are lost, and grow back; null: num_workers",
    )
    cpus_per_worker: PositiveInt = Field(default=1, description="processors per worker; also its threads")
    env: dict[str, str] = Field(
        default={},
        description="environment variables of all workers, such as {NCCL_SOCKET_IFNAME: eth0}; their names begin with "
        + ", ".join(ENV_PREFIXES),
    )
    use_gpu: Literal["auto"] | bool = Field(
        default="auto",
        description="one GPU per worker (nccl), or none (gloo); auto: GPUs if the Ray cluster (for torchrun the "
        "machine) has them at the run's first start",
    )

    @pydantic.field_validator("env", mode="before")
    @classmethod
    def _numbers_as_texts(cls, env: Any) -> Any:
        is_number = {name: type(value) in (int, float) for name, value in env.items()} if isinstance(env, dict) else {}
        return {name: str(env[name]) if is_number[name] else env[name] for name in is_number} if is_number else env

    @pydantic.field_validator("env")
    @classmethod
    def _known_names(cls, env: dict[str, str]) -> dict[str, str]:
        if unknown := [name for name in env if not name.startswith(ENV_PREFIXES)]:
            raise ValueError(
                f"{unknown[0]} is no variable of communication, memory or threads; expected names that begin with "
                f"{', '.join(ENV_PREFIXES)}"
            )
        return env

    @pydantic.model_validator(mode="after")
    def _range(self) -> Cluster:
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ValueError(f"min_workers ({self.min_workers}) must be at most num_workers ({self.num_workers})")
        return self


class Tracking(_Section):
    """MLflow."""

    uri: str | None = Field(
        default=None, description="MLflow; default MLFLOW_TRACKING_URI, else mlflow.db in the folder of the runs"
    )
    experiment: str = Field(default="mmcot", description="MLflow experiment")
    send_every_s: PositiveFloat = Field(default=2.0, description="seconds between batches of points")
    register_models: bool = Field(default=True, description="copy finished models into MLflow's registry")


class Tuning(_Section):
    """Search space, trials and their early end."""

    space: dict[str, Any] = Field(
        default={}, description="what is searched: setting: {loguniform|uniform|randint|choice|grid: [...]}"
    )
    arms: dict[str, dict[str, Any]] = Field(
        default={}, description="named settings that belong together; each arm is a trial, for every point of the grids"
    )
    stage: str = Field(
        default=RATIONALE, description="what a trial trains: the pipeline up to this stage of the chain, or 'pipeline'"
    )
    objective: Literal["validation_loss", "rougeL", "accuracy"] = Field(
        default="validation_loss",
        description="the measure of a trial: the stage's validation loss, or a score of the validation split at its "
        "end",
    )
    search: Literal["random", "optuna"] = Field(
        default="random", description="how values are drawn; grids are always searched completely"
    )
    scheduler: Literal["none", "asha", "median", "pbt"] = Field(
        default="asha", description="which trials are ended early, by validation loss"
    )
    num_samples: PositiveInt = Field(default=8, description="trials (with grids: times the whole grid)")
    max_concurrent: PositiveInt | None = Field(default=None, description="trials at a time; null: as many as fit")
    grace_steps: PositiveInt | None = Field(
        default=None,
        description="steps of every trial before it may end; with pbt: steps between exchanges; null: "
        "training.validate_every",
    )
    reduction_factor: float = Field(default=3.0, gt=1, description="asha keeps one of this many trials at each rung")
    time_budget_s: PositiveFloat | None = Field(default=None, description="seconds after which trials are stopped")

    @pydantic.model_validator(mode="after")
    def _early_ends_need_losses(self) -> Tuning:
        if self.scheduler != "none" and self.objective != "validation_loss":
            raise ValueError(
                f"scheduler {self.scheduler} ends trials by validation_loss; with objective {self.objective} use "
                "scheduler none"
            )
        if self.scheduler != "none" and self.stage == "pipeline":
            raise ValueError(
                f"scheduler {self.scheduler} needs one training to watch: stage rationale or answer, not pipeline"
            )
        if self.search == "optuna" and (
            self.arms or any("grid" in spec for spec in self.space.values() if isinstance(spec, dict))
        ):
            raise ValueError(
                "search optuna draws every value and goes through no grid or arms; use choice instead of grid, or "
                "search random"
            )
        return self

    @property
    def until(self) -> str:
        """The last step of a trial."""
        return "evaluate" if self.stage == "pipeline" or self.objective != "validation_loss" else f"train-{self.stage}"


class Settings(_Section):
    """All settings of a run, checked as a whole."""

    run: Run = Run()
    extensions: list[str] = Field(
        default=[],
        description="modules on the Python path that add chains, bridges, metrics or forms of data (docs/extending.md)",
    )
    data: Data = Data()
    model: Model = Model()
    training: Training = Training()
    rationale: RationaleStage | None = Field(default=None, description="the stage that writes rationales")
    answer: AnswerStage | None = Field(default=None, description="the stage that answers")
    stages: dict[str, ReadingStage] = Field(
        default={}, description="the stages of other chains by name; rationale and answer have sections of their own"
    )
    generation: Generation = Generation()
    cluster: Cluster = Cluster()
    tracking: Tracking = Tracking()
    tuning: Tuning = Tuning()

    def __setstate__(self, state: Any) -> None:
        """Load the extensions in a process that the settings are sent to."""
        super().__setstate__(state)
        load_extensions(self.extensions)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _stages_of_chain(cls, values: Any) -> Any:
        """Load extensions; put every stage into its place, with the chain's own format where none is given."""
        if not isinstance(values, dict):
            return values
        if isinstance(names := values.get("extensions"), list):
            load_extensions(str(name) for name in names)
        values, run = sections_of_stages(values), values.get("run")
        name = run.get("chain", "two-stage") if isinstance(run, dict) else "two-stage"
        try:
            chain = chain_named(name)
        except (ValueError, TypeError):
            return values  # the field's own validator reports it
        for stage in chain.stages:
            if isinstance(given := _stage_values(values, stage.name), dict) and not given.get("format"):
                values = _with_stage(values, stage.name, given | {"format": stage.format})
        return values

    @pydantic.model_validator(mode="after")
    def _chain_fits(self) -> Settings:
        for stage in self.chain.stages:
            self.stage(stage.name)
            self.training_of(stage.name)
        if unknown := sorted(self.stages.keys() - set(self.chain.stage_names)):
            raise ValueError(
                f"stages.{unknown[0]} is no stage of run.chain {self.run.chain}; it has "
                f"{', '.join(self.chain.stage_names)}"
            )
        given = [name for name, section in self.stage_sections.items() if getattr(section, "rationales", None)]
        readers = [stage.name for stage in self.chain.stages if set(stage.reads) & set(self.chain.given)]
        if bool(given) != bool(readers) or not set(given) <= set(readers):
            where = " or ".join(f"{name}.rationales" for name in readers) or "answer.rationales"
            raise ValueError(
                f"{where} and a chain that is given texts, such as run.chain given-rationales, belong together; "
                "set both, or neither"
            )
        for stage in self.chain.stages:
            try:
                reads, _ = split_format(self.stage(stage.name).format)
            except ValueError as error:
                raise ValueError(f"setting {stage.name}.format: {error}") from None
            if "G" in reads and not stage.reads:
                raise ValueError(
                    f"{stage.name}.format {self.stage(stage.name).format} does not go with run.chain {self.run.chain}, "
                    f"which has no rationale to read; use {stage.format}"
                )
        self._check_room_for_reasons()
        return self

    def _check_room_for_reasons(self) -> None:
        answering = self.chain.answering
        if answering is None or answering.reads or self.rationale is None:
            return
        answer = self.stage(answering.name)
        if (
            split_format(answer.format)[1] not in ("A", "T")
            and answer.max_target_tokens < self.rationale.max_target_tokens
        ):
            raise ValueError(
                f"{answering.name}.max_target_tokens ({answer.max_target_tokens}) would cut off the reasons that "
                f"run.chain {self.run.chain} writes with the answer; give them more room than "
                f"rationale.max_target_tokens ({self.rationale.max_target_tokens})"
            )

    @pydantic.model_validator(mode="after")
    def _has_pictures_to_exchange(self) -> Settings:
        if self.generation.other_pictures and self.data.features is None:
            raise ValueError("generation.other_pictures exchanges pictures, and data.features is null; set one of them")
        return self

    @pydantic.model_validator(mode="after")
    def _texts_may_end(self) -> Settings:
        for stage in self.chain.writing:
            most, least = self.stage(stage.name).max_target_tokens, self.generation.min_new_tokens
            if least >= most:
                raise ValueError(
                    f"generation.min_new_tokens ({least}) leaves the texts of stage {stage.name!r} no room to end; it "
                    f"must be below {stage.name}.max_target_tokens ({most})"
                )
        return self

    @pydantic.model_validator(mode="after")
    def _something_to_train(self) -> Settings:
        for stage in self.chain.stage_names if self.data.features is None else ():
            if self.training_of(stage).trained == "bridge":
                raise ValueError(
                    f"stage {stage!r} trains the bridge alone, which leaves nothing to train without data.features; "
                    "set them, or training.trains (instead of training.freeze_backbone) to lora or all"
                )
        return self

    @property
    def chain(self) -> Chain:
        """The chain of trainings."""
        return chain_named(self.run.chain)

    @property
    def stage_sections(self) -> dict[str, StageSettings]:
        """The settings of every stage that has some, also of stages that the chain does not have."""
        named = {RATIONALE: self.rationale, ANSWER: self.answer}
        return {name: part for name, part in {**named, **self.stages}.items() if part is not None}

    def stage(self, name: str) -> StageSettings:
        """Return the settings of a stage.

        Raises:
            SettingsError: there are none.
        """
        if name not in self.stage_sections:
            raise SettingsError(
                f"settings of the stage {name!r} are missing (run.chain {self.run.chain}); give "
                f"stages.{name}.num_steps or .num_epochs, or use a preset"
            )
        return self.stage_sections[name]

    def training_of(self, name: str) -> Training:
        """Return the training settings of a stage: the common ones with its own."""
        spec, stage = self.stage(name), self.chain.stage(name)
        own = {
            key: value
            for key in ("learning_rate", "global_batch_size", "micro_batch_size")
            if (value := getattr(spec, key)) is not None
        }
        trains = spec.trains or (None if stage.trains == "all" else stage.trains)
        if trains is not None:
            own |= {"trains": trains, "freeze_backbone": trains == "bridge"}
        if stage.objective == MATCHING:
            own["group_by_length"] = False  # negatives are those of the block: they must not be alike in length
        return Training.model_validate(self.training.model_dump() | own) if own else self.training

    @property
    def stages_train_alike(self) -> bool:
        """Whether no stage trains other parts of its model than the others."""
        return len({str(self.training_of(name).trained) for name in self.chain.stage_names}) == 1

    def of_stage(self, name: str, *, start: str | None = None) -> Settings:
        """Return the settings as the training of a stage uses them.

        Args:
            start: the folder of the model that it starts from, where that is an earlier stage's.
        """
        update: dict[str, Any] = {"training": self.training_of(name)}
        if self.chain.stage(name).starts_from != PRETRAINED:
            update["model"] = self.model.model_copy(update={"pretrained": start})
        return self.model_copy(update=update)

    def trains_on_gold(self, name: str) -> bool:
        """Whether a stage trains on the gold texts of the stages before it."""
        return getattr(self.stage(name), "rationale_source", "generated") == "gold"

    @property
    def watched_stage(self) -> str:
        """The training whose validation loss a tuning follows."""
        return self.chain.stages[-1].name if self.tuning.stage == "pipeline" else self.tuning.stage

    @property
    def given_texts(self) -> str | None:
        """The folder of given texts, if the chain reads such."""
        found = [getattr(self.stage(name), "rationales", None) for name in self.chain.stage_names]
        return next((folder for folder in found if folder), None)

    def gold_text(self, text: str, sample: Sample) -> str:
        """Return the gold of a text that a stage writes, or of a given one: the target of its format."""
        writer = self.chain.writer_of(text)
        return gold_rationale(sample, self.gold_format(writer))

    def gold_format(self, writer: Stage | None) -> str:
        """Return the format of a written text; given texts have that of the rationale section."""
        if writer is not None:
            return self.stage(writer.name).format
        return self.rationale.format if self.rationale else "QCM-E"

    def gold_reasons(self, sample: Sample) -> str | None:
        """Return the reference of this run's rationales; None where the run generates none."""
        answering = self.chain.answering
        if answering is None:
            return None
        if answering.reads:
            return self.gold_text(answering.reads[-1], sample)
        return self.chain.gold_reasons(sample, format=self.stage(answering.name).format)

    @property
    def run_dir(self) -> Path:
        """The folder of the run."""
        return Path(self.run.dir or Path("runs") / self.run.name)


def sections_of_stages(values: dict[str, Any]) -> dict[str, Any]:
    """Return plain values with ``stages.rationale`` and ``stages.answer`` as the sections of these names."""
    stages = values.get("stages")
    if not isinstance(stages, dict) or not stages.keys() & {RATIONALE, ANSWER}:
        return values
    values = values | {"stages": {name: value for name, value in stages.items() if name not in (RATIONALE, ANSWER)}}
    for name in (RATIONALE, ANSWER):
        if name in stages:
            both = isinstance(values.get(name), dict) and isinstance(stages[name], dict)
            values[name] = values[name] | stages[name] if both else stages[name]
    return values


def _stage_values(values: dict[str, Any], name: str) -> Any:
    if name in (RATIONALE, ANSWER):
        return values.get(name)
    stages = values.get("stages")
    return stages.get(name) if isinstance(stages, dict) else None


def _with_stage(values: dict[str, Any], name: str, section: dict[str, Any]) -> dict[str, Any]:
    if name in (RATIONALE, ANSWER):
        return values | {name: section}
    return values | {"stages": values["stages"] | {name: section}}
