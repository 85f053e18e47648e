"""The loops that ``training.py`` compares, over the same real questions: bare PyTorch, bare DeepSpeed, Trainer, ours.

Each ``*_loop`` opens a model with the same random weights and returns a function that trains over steps and returns
its processor-seconds and its losses. A step is a batch of ``BATCH`` questions in blocks of ``BLOCK``.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from data_shards.plan import Plan
from data_shards.sources.forms import read_questions
from data_shards.stream import Step
from launcher.config.settings import Training
from launcher.stages.samples import Block
from launcher.training.collectives import host_sum
from launcher.training.deepspeed_engine import build_engine, set_learning_rate
from launcher.training.engine_steps import optimizer_step
from launcher.training.step_checks import was_applied
from launcher.training.throughput import Meter, count_step
from mmcot.models.loss import UNITS, count_target_tokens, objective_named, text_objective
from mmcot.models.t5 import T5ForMultimodalGeneration
from mmcot.texts.encoding import EncodedPair, collate, encode_pair
from mmcot.texts.prompts import build_pair
from mmcot.texts.tokenizer import train_tokenizer

SMALL = {"vocab_size": 32128, "d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 8, "num_heads": 6}
TINY = {"vocab_size": 8000, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
KIND = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "dropout_rate": 0.1}
PATCHES = (145, 1024)  # ViT's
BATCH, BLOCK = 8, 4
LONGEST = 512  # tokens of a source, and of a target; the published program pads both to it
LEARNING_RATE, WEIGHT_DECAY, CLIP_NORM = 1e-4, 0.01, 1.0
Order = list[np.ndarray]  # a batch: its blocks, each with the numbers of its questions
Loop = Callable[[Sequence[Step]], tuple[float, list[float]]]


@dataclasses.dataclass(frozen=True)
class Questions:
    """Encoded questions, a whole number of batches; features are random, of a pool of 16 pictures."""

    pairs: list[EncodedPair]
    features: list[np.ndarray]

    @property
    def real_tokens(self) -> int:
        """Source and target tokens without padding."""
        return sum(len(pair.source_ids) + len(pair.target_ids) for pair in self.pairs)

    def load(self, block: np.ndarray, *, pad_to: int = 0) -> dict[str, torch.Tensor]:
        """The tensors of a block of questions; ``pad_to``: both sides have this length."""
        return collate(
            [self.pairs[number] for number in block],
            [self.features[number % len(self.features)] for number in block],
            feature_shape=PATCHES,
            pad_token_id=0,
            decoder_start_token_id=0,
            length_multiple=pad_to or 1,
        )

    def padded_tokens(self, batch: Order, *, pad_to: int = 0) -> int:
        """Source and target tokens that a batch computes."""
        return sum(
            len(block)
            * (
                max(pad_to, *(len(self.pairs[number].source_ids) for number in block))
                + max(pad_to, *(len(self.pairs[number].target_ids) for number in block))
            )
            for block in batch
        )


def read_pairs(data: Path, folder: Path) -> Questions:
    """The training questions of a data set with their explanations, by a tokenizer of 8000 pieces trained on them."""
    texts = [build_pair(problem, "QCM-E") for problem in read_questions(data).problems["train"]]
    tokenizer = train_tokenizer((text for pair in texts for text in pair), folder, vocab_size=8000)
    pairs = [encode_pair(tokenizer, *pair, max_source_tokens=LONGEST, max_target_tokens=LONGEST) for pair in texts]
    random = np.random.Generator(np.random.PCG64(0))
    features = [random.standard_normal(PATCHES, dtype=np.float32) for _ in range(16)]
    return Questions(pairs[: len(pairs) // BATCH * BATCH], features)


def planned_order(questions: Questions, max_tokens: int | None = None) -> list[Order]:
    """Our plan of an epoch: blocks of questions that are alike in both lengths, by number or by tokens."""
    sources, targets = (
        np.array([len(getattr(pair, side)) for pair in questions.pairs]) for side in ("source_ids", "target_ids")
    )
    plan = Plan(
        sources,
        targets,
        np.zeros(len(sources), np.int64),
        seed=0,
        epoch=0,
        global_batch_size=BATCH,
        micro_batch_size=BLOCK,
        max_tokens_per_block=max_tokens,
    )
    return [plan.batch_blocks(step) for step in range(plan.num_steps)]


def trainer_order(questions: Questions, grouped_by: str | None) -> list[Order]:
    """The order of transformers' Trainer: random, or by its own sampler for ``source`` or ``source and target``."""
    random = torch.Generator().manual_seed(0)
    if grouped_by is None:
        order = torch.randperm(len(questions.pairs), generator=random).tolist()
    else:
        lengths = [
            len(pair.source_ids) + (len(pair.target_ids) if grouped_by == "source and target" else 0)
            for pair in questions.pairs
        ]
        order = list(LengthGroupedSampler(BATCH, lengths=lengths, generator=random))
    numbers = np.array(order).reshape(-1, BATCH // BLOCK, BLOCK)
    return [list(batch) for batch in numbers]


def typical(questions: Questions, epoch: list[Order], number: int) -> list[Order]:
    """``number`` batches that stand for an epoch: every n-th by padded tokens, with the mean nearest to the epoch's."""
    by_size = sorted(epoch, key=questions.padded_tokens)
    sizes = np.array([questions.padded_tokens(batch) for batch in by_size])
    distance = len(by_size) / number
    chosen = [((np.arange(number) + part) * distance).astype(int) for part in np.linspace(0, 0.99, 100)]
    nearest = min(chosen, key=lambda places: abs(sizes[places].mean() - sizes.mean()))
    return [by_size[place] for place in nearest]


def steps_of(questions: Questions, batches: list[Order]) -> list[Step]:
    """The batches as our loader yields them."""
    return [
        Step(number, [(index, Block(questions.load(block), ("q",) * len(block))) for index, block in enumerate(batch)])
        for number, batch in enumerate(batches)
    ]


def share(steps: Sequence[Step], *, rank: int, world_size: int) -> list[Step]:
    """The blocks of a rank."""
    return [dataclasses.replace(step, blocks=step.blocks[rank::world_size]) for step in steps]


def new_model(shape: dict[str, Any]) -> T5ForMultimodalGeneration:
    """The same random weights at every call; the head's are small, so that the first loss is near that of chance.

    ``shape`` are the sizes of a T5; its ``bridge`` has values of ``MultimodalT5Config`` that say where pictures enter.

    As transformers draws them the loss begins near 100: most probabilities are then subnormal numbers, with which a
    processor multiplies matrices many times slower, and a step would measure those.
    """
    torch.manual_seed(0)
    sizes = {name: value for name, value in shape.items() if name != "bridge"}
    vision = {"vision_num_patches": PATCHES[0], "vision_dim": PATCHES[1]} | shape.get("bridge", {})
    model = T5ForMultimodalGeneration.start(sizes | KIND, vision, pad_token_id=0, eos_token_id=1)
    with torch.no_grad():
        model.lm_head.weight.mul_(shape["d_model"] ** -0.5)
    return model


def new_optimizer(model: torch.nn.Module) -> torch.optim.AdamW:
    """Fused AdamW with decay for matrices only, as our settings have it."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, fused=True)


def seed_dropout(step: Step, index: int) -> None:
    """The seed that our own loop sets for a block."""
    torch.manual_seed(step.number * 4_099 + index)


def loss_of(model: Any, block: Block) -> torch.Tensor:
    """The sum of the losses of a block's target tokens."""
    inputs = {name: tensor for name, tensor in block.tensors.items() if name != "labels"}
    return text_objective(model, inputs, block.labels)["text"][0]


def bare_loop(shape: dict[str, Any], world_size: int = 1) -> Loop:
    """What one writes without a library; several ranks sum their gradients, which are one tensor, by one all-reduce."""
    model = new_model(shape).train()
    optimizer = new_optimizer(model)
    flat = flat_gradients(model) if world_size > 1 else None

    def run(steps: Sequence[Step]) -> tuple[float, list[float]]:
        losses, started = [], time.process_time()
        for step in steps:
            found = torch.zeros(2, dtype=torch.float64)
            found[1] = sum(count_target_tokens(block.labels) for _, block in step.blocks)
            tokens = found[1].clone()
            if world_size > 1:
                dist.all_reduce(tokens)
            for index, block in step.blocks:
                seed_dropout(step, index)
                loss = loss_of(model, block) / tokens.item()
                loss.backward()
                found[0] += loss.item()
            if flat is not None:
                dist.all_reduce(flat)
                dist.all_reduce(found)
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
            optimizer.step()
            if flat is None:
                optimizer.zero_grad()
            else:
                flat.zero_()
            losses.append(found[0].item())
        return time.process_time() - started, losses

    return run


def flat_gradients(model: torch.nn.Module) -> torch.Tensor:
    """One tensor of all gradients; each parameter's gradient is a view of it."""
    parameters = list(model.parameters())
    flat = torch.zeros(sum(parameter.numel() for parameter in parameters))
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)
    return flat


def deepspeed_loop(shape: dict[str, Any]) -> Loop:
    """DeepSpeed's ZeRO-2 at its defaults, with its own accumulation."""
    model, blocks = new_model(shape), BATCH // BLOCK
    config = {
        "train_micro_batch_size_per_gpu": BLOCK,
        "gradient_accumulation_steps": blocks,
        "gradient_clipping": CLIP_NORM,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine: Any = deepspeed.initialize(model=model, optimizer=new_optimizer(model), config=config)[0]

    def run(steps: Sequence[Step]) -> tuple[float, list[float]]:
        engine.train()
        losses, started = [], time.process_time()
        for step in steps:
            tokens, total = sum(count_target_tokens(block.labels) for _, block in step.blocks), 0.0
            for index, block in step.blocks:
                seed_dropout(step, index)
                loss = loss_of(engine, block) / tokens
                engine.backward(loss * blocks)
                engine.step()
                total += loss.item()
            losses.append(total)
        return time.process_time() - started, losses

    return run


def our_loop(shape: dict[str, Any], stage: int, world_size: int = 1) -> Loop:
    """The step of the training loop with its counts and checks."""
    training = Training(
        zero_stage=stage,  # pyright: ignore[reportArgumentType]
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        clip_norm=CLIP_NORM,
        micro_batch_size=BLOCK,
    )
    engine: Any = build_engine(lambda: new_model(shape), training, world_size=world_size, random_weights=True)
    meter, objective = Meter(peak_flops=1e12), objective_named("text")

    def run(steps: Sequence[Step]) -> tuple[float, list[float]]:
        losses, started = [], time.process_time()
        for step in steps:
            counts = host_sum(count_step(step, engine.module))
            set_learning_rate(engine, LEARNING_RATE)
            parts = optimizer_step(
                engine,
                step,
                objective,
                seed=0,
                counts=dict(zip(UNITS, counts, strict=False)),  # they come first
                world_size=world_size,
                meter=meter,
                observe=False,
            )
            losses.append(sum(parts.values()))
            assert was_applied(engine, losses[-1])
            meter.add(counts)
        return time.process_time() - started, losses

    return run


class _Clock(TrainerCallback):
    """Processor-seconds from the first step's begin to the last step's end."""

    def __init__(self) -> None:
        self.started = self.ended = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = self.started or time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ended = time.process_time()


class Numbers(torch.utils.data.Dataset):
    """The numbers of questions in a given order; the collator reads the questions."""

    def __init__(self, numbers: list[int]) -> None:
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> int:
        return self.numbers[index]


class TransformersLoop:
    """transformers' Trainer with our model and optimizer; one model for all ways to pad."""

    def __init__(self, shape: dict[str, Any], questions: Questions, folder: Path) -> None:
        self.model, self.questions, self.folder = new_model(shape), questions, folder
        self.optimizer = new_optimizer(self.model)

    def trainer(self, batches: list[Order], pad_to: int) -> Trainer:
        """A Trainer over batches in the given order."""
        arguments = TrainingArguments(
            output_dir=str(self.folder),
            per_device_train_batch_size=BLOCK,
            gradient_accumulation_steps=BATCH // BLOCK,
            max_steps=len(batches),
            max_grad_norm=CLIP_NORM,
            train_sampling_strategy="sequential",
            use_cpu=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1.0)
        trainer = Trainer(
            model=self.model,
            args=arguments,
            train_dataset=Numbers([int(number) for batch in batches for block in batch for number in block]),
            data_collator=lambda numbers: self.questions.load(np.array(numbers), pad_to=pad_to),
            optimizers=(self.optimizer, schedule),
        )
        trainer.remove_callback(PrinterCallback)
        assert trainer.accelerator.num_processes == 1 and not trainer.accelerator.use_distributed, "one process alone"
        return trainer

    def seconds(self, batches: list[Order], pad_to: int) -> float:
        """Processor-seconds of the batches."""
        trainer, clock = self.trainer(batches, pad_to), _Clock()
        trainer.add_callback(clock)
        trainer.train()
        return clock.ended - clock.started

    def losses_of_one_block(self, batch: Order) -> tuple[float, float]:
        """The mean loss a token of a block without dropout: by the Trainer, and by our objective."""
        trainer, tensors = self.trainer([batch], 0), self.questions.load(batch[0])
        self.model.eval()
        with torch.no_grad():
            loss: Any = trainer.compute_loss(self.model, dict(tensors))
            ours = loss_of(self.model, Block(tensors, ())).item() / count_target_tokens(tensors["labels"])
        return loss.item(), ours
