"""One DeepSpeed ZeRO engine per rank, configured from our settings.

The training loop decides where a global batch ends (``managed_gradient_accumulation`` is
off), scales its own loss and sets its own learning rate; DeepSpeed shards, reduces,
clips and updates.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param

from launcher.config.loading import read_deepspeed
from launcher.config.settings import SettingsError, Training
from launcher.training.checkpoint_writer import HostCopies
from launcher.training.collectives import open_host_group, refuse_pickles
from launcher.training.frozen_weights import exact_weights
from launcher.training.rank_sockets import listen_on_ranks_network
from launcher.training.whole_gradients import no_whole_gradients, use_whole_gradients
from mmcot.models.device import open_device
from mmcot.models.trained_parts import choose_trained

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BUCKET_SIZE = 50_000_000  # values reduced together; DeepSpeed's 500 million take 1 GB, whatever the model's size
DUMMY_GRADIENT_ACCUMULATION = 1  # DeepSpeed requires a value; our loop accumulates by itself
_TORCHS_LINEAR = torch.nn.functional.linear
_DECIDED_BY = {
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "train_batch_size": "training.micro_batch_size times the number of workers",
    "gradient_accumulation_steps": "training.global_batch_size, counted in blocks by our own loop,",
    "managed_gradient_accumulation": "our own loop",
    "gradient_clipping": "training.clip_norm",
    "zero_optimization.stage": "training.zero_stage",
    "bf16.enabled": "training.precision",
    "zero_allow_untested_optimizer": "our own optimizer",
    "checkpoint.load_universal": "the checkpoint that is loaded",
}
_NOT_THEIRS = {
    "optimizer": "the optimizer is AdamW with training.learning_rate, beta1, beta2 and weight_decay",
    "scheduler": "the learning rate is training.schedule's",
    "fp16": "T5 overflows fp16; use training.precision=bf16",
    "pipeline": "pipeline parallelism is not used",
}


def init_distributed(
    *,
    use_gpu: bool,
    gpu_index: int | None = None,
    precision: str = "fp32",
    tf32: bool = False,
    timeout_s: float = 1800.0,
) -> None:
    """Choose this process's device and join the process group: nccl on GPUs, gloo without.

    DeepSpeed's shared-memory collectives are switched off: they would compile C++ at the
    first start, which fails on a machine without a compiler. Data from other ranks is never unpickled.

    Args:
        gpu_index: which of the GPUs that this process sees is its own; None where the launcher has chosen it already,
            as srun may.
        precision: in which the training computes.
        tf32: see ``open_device``.
        timeout_s: seconds after which a collective without an answer fails.

    Raises:
        DeviceError: there is no such GPU, or it does not compute in this precision.
    """
    open_device(use_gpu=use_gpu, index=gpu_index, precision=precision, tf32=tf32)
    refuse_pickles()
    listen_on_ranks_network()
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    timeout = datetime.timedelta(seconds=timeout_s)
    deepspeed.init_distributed("nccl" if use_gpu else "gloo", timeout=timeout, verbose=False)
    open_host_group(timeout)


def deepspeed_config(
    training: Training, *, world_size: int, load_universal: bool = False, use_gpu: bool = False
) -> dict[str, Any]:
    """The DeepSpeed settings of a training, merged with the user's own; to be used, its ZeRO stage must be a number.

    Args:
        load_universal: whether the checkpoint to load was converted from another world size.
        use_gpu: whether the process group is of GPUs.

    Raises:
        SettingsError: the user's settings contradict ours.
    """
    config = {
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": DUMMY_GRADIENT_ACCUMULATION,
        "train_batch_size": training.micro_batch_size * world_size,
        "managed_gradient_accumulation": False,
        "gradient_clipping": training.clip_norm,
        "zero_optimization": {
            "stage": training.zero_stage,
            # Beside the backward pass, on a stream of its own; it waits for the device at the end of every block.
            "overlap_comm": use_gpu and world_size > 1 and training.zero_stage in (2, 3),
            "reduce_bucket_size": BUCKET_SIZE,
            "allgather_bucket_size": BUCKET_SIZE,
            **_offload(training),
        },
        # Its check takes several operations a parameter; a norm that is not finite ends the training all the same.
        "bf16": {"enabled": training.precision == "bf16", "check_grad_overflow": False},
        # Added up in bf16, gradients of many blocks lose what is small beside their sum.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",  # DeepSpeed would send them in bf16
        "timers": {"throughput": {"enabled": False}},  # it waits for the device at every block
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
        "checkpoint": {"load_universal": load_universal},
    }
    merged = _merge(config, read_deepspeed(training.deepspeed))
    return merged if training.zero_stage else merged | {"gradient_clipping": 0.0}  # whole_gradients.py clips


def _offload(training: Training) -> dict[str, Any]:
    if training.offload == "none":
        return {}
    target: dict[str, Any] = {"device": training.offload, "pin_memory": torch.cuda.is_available()}
    if training.offload == "nvme":
        target["nvme_path"] = training.nvme_dir
    return {"offload_optimizer": target} | ({"offload_param": target} if training.zero_stage == 3 else {})


def _merge(ours: dict[str, Any], theirs: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Merge the two; a value that our settings decide may be repeated or be "auto", not changed."""
    merged = dict(ours)
    for key, value in theirs.items():
        name = f"{prefix}{key}"
        if name == "fp16" and isinstance(value, dict) and value.get("enabled") in (False, "auto"):
            continue
        if name in _NOT_THEIRS:
            raise SettingsError(f"training.deepspeed sets {name}; {_NOT_THEIRS[name]}; leave it out there")
        if isinstance(ours.get(key), dict) and not isinstance(value, dict) and value != "auto":
            raise SettingsError(
                f"training.deepspeed sets {name} = {value!r}, expected an object with keys such as "
                f"{next(iter(ours[key]))}, or auto"
            )
        if isinstance(value, dict) and isinstance(ours.get(key, {}), dict):
            merged[key] = _merge(ours.get(key, {}), value, f"{name}.")
        elif name in _DECIDED_BY and ours.get(key) != "auto":
            if value not in ("auto", ours.get(key)):
                raise SettingsError(
                    f"training.deepspeed sets {name} = {value!r}, {_DECIDED_BY[name]} makes it {ours.get(key)!r}; "
                    "leave it out there"
                )
        elif value != "auto":
            merged[key] = value
    return merged


def build_engine(
    build_model: Callable[[], PreTrainedModel],
    training: Training,
    *,
    world_size: int,
    random_weights: bool,
    load_universal: bool = False,
) -> deepspeed.DeepSpeedEngine:
    """Build the model and wrap it.

    Under ZeRO-3 pretrained weights are read into shards: an ``HfDeepSpeedConfig`` exists while
    ``build_model`` runs. Random weights are made whole on every rank and sharded afterwards: as shards
    they would be drawn in another order than under the other ZeRO stages, and the tensors that ``build_model``
    changes in place (``mmcot/models/attention_start.py``) would be empty.

    Args:
        random_weights: whether ``build_model`` draws the weights, the same on every rank, instead of reading them.
    """
    # ZeRO-3 replaces this function for the rest of the process, and its own rounds differently on some processors.
    torch.nn.functional.linear = _TORCHS_LINEAR
    config = deepspeed_config(
        training,
        world_size=world_size,
        load_universal=load_universal,
        use_gpu=dist.get_backend() == "nccl",
    )
    if training.zero_stage == 3 and not random_weights:
        from transformers.integrations.deepspeed import HfDeepSpeedConfig

        keep_alive = HfDeepSpeedConfig(config)
        model = build_model()
        del keep_alive
    else:
        model = build_model()
    if training.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(
        _parameter_groups(model, training),
        lr=training.learning_rate,
        betas=(training.beta1, training.beta2),
        fused=True,  # one operation for all parameters, without a copy of them
    )
    engine: Any = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    engine.checkpoint_engine = HostCopies(engine.checkpoint_engine)
    if no_whole_gradients(engine) is None:
        use_whole_gradients(engine, clip_norm=training.clip_norm, in_place=engine.device.type == "cuda")
    return engine


def set_learning_rate(engine: deepspeed.DeepSpeedEngine, value: float) -> None:
    """Use ``value`` for the coming optimizer step; the fusion layers keep their ratio to it."""
    optimizer: Any = engine.optimizer  # every optimizer wrapper of DeepSpeed has param_groups
    for group in optimizer.param_groups:
        group["lr"] = value * group["lr_ratio"]


def full_state_dict(engine: deepspeed.DeepSpeedEngine) -> dict[str, torch.Tensor] | None:
    """The whole model's weights on rank 0, None elsewhere; every rank must call it.

    Of a training in bf16 they are the fp32 weights that the optimizer updates and those that it started from, not their
    rounded copies.
    """
    if engine.bfloat16_enabled():
        return _full_masters(engine)
    if engine.zero_optimization_partition_weights():
        return engine._zero3_consolidated_16bit_state_dict()
    module: Any = engine.module
    return module.state_dict() if dist.get_rank() == 0 else None


def _full_masters(engine: deepspeed.DeepSpeedEngine) -> dict[str, torch.Tensor] | None:
    module: Any = engine.module
    masters: dict[int, Any] = {}
    rounded: dict[int, torch.Tensor] = {}
    for parameter in module.parameters():
        master = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
        if master is None:  # a parameter that is not trained has no fp32 copy
            with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                if dist.get_rank() == 0:
                    rounded[id(parameter)] = parameter.detach().cpu().clone()
        elif dist.get_rank() == 0:
            masters[id(parameter)] = master.cpu()
    if dist.get_rank() != 0:
        return None
    state = module.state_dict(keep_vars=True)  # by all names of a tensor: tied weights have several
    exact = exact_weights(
        module.name_or_path, {n: rounded[id(value)] for n, value in state.items() if id(value) in rounded}
    )
    masters |= {key: value.float() for key, value in rounded.items()} | {id(state[n]): exact[n] for n in exact}
    return {name: masters.get(id(value), value) for name, value in state.items()}


def _parameter_groups(model: Any, training: Training) -> list[dict[str, Any]]:
    """Groups of what is trained: weight decay for matrices only, a learning rate of its own for the fusion layers."""
    choose_trained(model, training.trained)
    fusion_ratio = (training.fusion_learning_rate or training.learning_rate) / training.learning_rate
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        in_fusion = name.startswith(model.new_parts)
        is_matrix = len(getattr(parameter, "ds_shape", parameter.shape)) > 1
        key = (training.weight_decay if is_matrix else 0.0, fusion_ratio if in_fusion else 1.0)
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr_ratio": ratio}
        for (decay, ratio), parameters in groups.items()
    ]
