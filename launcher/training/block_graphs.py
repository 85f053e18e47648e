"""The forward and backward pass of a block as a CUDA graph, one for each shape.

A small model's pass is more than a thousand kernels, and launching them takes longer than computing them. A graph
launches them by one call, with fixed shapes and addresses: a block's tensors are copied to where the graph reads them,
and its gradients are added to where they always are (``whole_gradients.py``). Dropout draws the same numbers as without
a graph, because a replay reads the generator's present seed.

A shape is captured when it occurs for the second time; the shape that was not used for the longest time is dropped.
"""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch

from launcher.config.settings import Training
from launcher.stages.samples import Block
from mmcot.models.loss import UNITS, LossParts, Objective

MAX_GRAPHS = 128
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of a loss, relative

Shape = tuple[tuple[str, tuple[int, ...]], ...]


def reason_without_graphs(training: Training) -> str | None:
    """Why a training on GPUs runs without graphs although ``training.cuda_graphs`` is set; None: it runs with them."""
    if training.zero_stage not in (0, 1) or (training.zero_stage == 1 and training.precision == "fp32"):
        return f"ZeRO stage {training.zero_stage} in {training.precision} has buffers of its own for gradients"
    if training.offload != "none":
        return f"training.offload={training.offload} moves gradients to main memory"
    if training.activation_checkpointing:
        return "training.activation_checkpointing reads the state of the random numbers"
    return None


class BlockGraphs:
    """Runs blocks of known shapes by graphs; the thread that makes it computes on a stream of its own from then on.

    Args:
        engine: with whole gradients, in place.
        max_graphs: shapes that are kept.
    """

    def __init__(self, engine: Any, objective: Objective, *, max_graphs: int = MAX_GRAPHS) -> None:
        self._engine, self._objective, self._max_graphs = engine, objective, max_graphs
        self._graphs: OrderedDict[Shape, _Graph] = OrderedDict()
        self._seen: set[Shape] = set()
        self._scales = {unit: torch.zeros((), device=engine.device) for unit in UNITS}
        self._stream = self._pool = None
        if engine.device.type == "cuda":
            # The default stream cannot be captured, and autograd remembers on which stream it has added a gradient.
            self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
            self._stream.wait_stream(torch.cuda.current_stream())
            torch.cuda.set_stream(self._stream)
        self.failure: str | None = None  # why no block is run by a graph any more

    def run(self, block: Block, *, seed: int, scales: Mapping[str, float]) -> LossParts | None:
        """Add a block's gradients; returns the parts of its loss, or None where its shape has no graph yet.

        Args:
            seed: of its dropout.
            scales: by unit, the factor of the parts of the loss whose gradient is added.
        """
        shape = tuple((name, tuple(tensor.shape)) for name, tensor in sorted(block.tensors.items()))
        is_first = shape not in self._seen
        self._seen.add(shape)
        if self.failure or is_first:
            return None
        if shape not in self._graphs and not self._capture(shape, block, seed):
            return None
        self._graphs.move_to_end(shape)
        graph = self._graphs[shape]
        for name, tensor in block.tensors.items():
            graph.tensors[name].copy_(tensor, non_blocking=True)
        self._set_scales(scales if block.qids else dict.fromkeys(UNITS, 0.0))  # a dummy block has no question
        torch.manual_seed(seed)
        # The next replay writes to the same memory.
        return {
            name: (part.clone() if block.qids else part * 0.0, unit) for name, (part, unit) in graph.replay().items()
        }

    def _set_scales(self, scales: Mapping[str, float]) -> None:
        for unit, scale in scales.items():
            self._scales[unit].fill_(scale)

    def _capture(self, shape: Shape, block: Block, seed: int) -> bool:
        """Capture a graph and compare its loss with that of the same operations without it; False after a failure."""
        while len(self._graphs) >= self._max_graphs:
            self._graphs.popitem(last=False)
        tensors = {
            name: tensor.to(self._engine.device, non_blocking=True, copy=True) for name, tensor in block.tensors.items()
        }
        self._set_scales(dict.fromkeys(UNITS, 0.0))  # these runs add zeros to the gradients
        losses = []
        try:
            replay = self._captured(lambda: self._compute(tensors))
            for run in (replay, lambda: self._compute(tensors)):
                torch.manual_seed(seed)
                losses.append(sum(part.item() for part, _ in run().values()))
        except RuntimeError as error:
            self._fail(f"capturing a block of {_describe(shape)} failed: {str(error).splitlines()[0]}")
            return False
        found, expected = losses
        if not _close(found, expected, self._engine.module.dtype):
            self._fail(f"a graph of {_describe(shape)} computes the loss {found:.6f}, without it {expected:.6f}")
            return False
        self._graphs[shape] = _Graph(tensors, replay)
        return True

    def _captured(self, compute: Callable[[], LossParts]) -> Callable[[], LossParts]:
        """The same computation by one call, which writes its results to the same memory each time."""
        if self._stream is None:
            return compute
        compute()  # the choice of kernels and their workspaces must not be captured
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile, as the loader does that pins memory.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            parts = compute()

        def replay() -> LossParts:
            graph.replay()
            return parts

        return replay

    def _fail(self, reason: str) -> None:
        self.failure = reason
        self._graphs.clear()
        if self._engine.bfloat16_enabled():  # a capture that failed may have left some
            for parameter in self._engine.module.parameters():
                parameter.grad = None

    def _compute(self, tensors: Mapping[str, torch.Tensor]) -> LossParts:
        inputs = dict(tensors)
        labels = inputs.pop("labels")
        parts = self._objective(self._engine.module, inputs, labels)
        scaled = [part * self._scales[unit] for part, unit in parts.values()]
        sum(scaled[1:], scaled[0]).backward()
        if self._engine.bfloat16_enabled():
            self._engine.optimizer.update_hp_grads()
        return {name: (part.detach(), unit) for name, (part, unit) in parts.items()}


@dataclasses.dataclass(frozen=True)
class _Graph:
    """The tensors that a graph reads, and its replay."""

    tensors: dict[str, torch.Tensor]
    replay: Callable[[], LossParts]


def _close(found: float, expected: float, dtype: torch.dtype) -> bool:
    if not math.isfinite(expected):  # the step ends the training with its own message
        return True
    return abs(found - expected) <= _TOLERANCE[dtype] * max(1.0, abs(expected))


def _describe(shape: Shape) -> str:
    sizes = dict(shape)
    return f"{sizes['input_ids'][0]} x ({sizes['input_ids'][1]} + {sizes['labels'][1]}) tokens"
