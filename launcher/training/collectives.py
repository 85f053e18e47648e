"""Small values between the ranks of a training, as JSON in tensors.

torch's own collectives of objects (``all_gather_object``, ``broadcast_object_list``) unpickle what arrives,
and torch's rendezvous accepts any process that reaches its port. So an unknown process could run code in every
rank. This module parses the bytes as JSON, and ``check_every_group`` ends a training that an unknown process has
joined, before any other value of it is used.

Only JSON values: a tuple arrives as a list, the keys of an object as strings, and a ``Path`` is refused.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import json
import secrets
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from mmcot.errors import OperationError

_new_group = dist.new_group  # torch's own
_host_group: Any = None  # of values in main memory, where the training's own group is one of GPUs

MAX_BYTES = 256 * 2**20  # of one rank's value; the largest are names and sha256s of a checkpoint's files


class CollectiveError(OperationError):
    """What a rank sent cannot be used; the message names the rank."""


def open_host_group(timeout: datetime.timedelta) -> None:
    """Prepare ``host_sum``; every rank calls it after it has joined the training's group."""
    global _host_group
    _host_group = dist.new_group(backend="gloo", timeout=timeout) if dist.get_backend() == "nccl" else None


def host_sum(values: Sequence[float]) -> list[float]:
    """The sums of values in main memory over all ranks, on every rank; a GPU is neither used nor waited for."""
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, group=_host_group)
    return tensor.tolist()


def broadcast_json(value: Any, *, source: int = 0) -> Any:
    """The value of rank ``source``, on every rank; every rank calls it, and the other values are ignored.

    Raises:
        TypeError: the value is no JSON value.
        CollectiveError: what arrived is too large or no JSON.
    """
    content = _encode(value) if dist.get_rank() == source else b""
    size = torch.tensor([len(content)], dtype=torch.int64, device=_device())
    dist.broadcast(size, src=source)
    _check_sizes({source: int(size)})
    buffer = _buffer(content, int(size))
    dist.broadcast(buffer, src=source)
    return _decode(buffer, int(size), source)


def gather_json(value: Any, *, group: Any = None) -> list[Any]:
    """Every rank's value, in the order of ranks, on every rank of a group; of all ranks without one.

    Raises:
        TypeError: the value is no JSON value.
        CollectiveError: what a rank sent is too large or no JSON.
    """
    content = _encode(value)
    ranks, device = dist.get_process_group_ranks(group), _device(group)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in ranks]
    dist.all_gather(sizes, torch.tensor([len(content)], dtype=torch.int64, device=device), group=group)
    num_bytes = [int(size) for size in sizes]
    _check_sizes(dict(zip(ranks, num_bytes, strict=True)))
    own = _buffer(content, max(num_bytes), group)
    buffers = [torch.empty_like(own) for _ in ranks]
    dist.all_gather(buffers, own, group=group)
    return [_decode(buffer, size, rank) for rank, buffer, size in zip(ranks, buffers, num_bytes, strict=True)]


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """The rows of all ranks in the order of ranks, [sum of n, ...], on every rank.

    Args:
        rows: [n, ...] of this rank; all but n is the same on every rank.
    """
    counts = gather_json(len(rows))
    padded = rows.new_zeros((max(counts), *rows.shape[1:]), device=_device())
    padded[: len(rows)] = rows
    buffers = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(buffers, padded)
    return torch.cat([buffer[:count] for buffer, count in zip(buffers, counts, strict=True)]).to(rows.device)


def check_every_group(token: str) -> None:
    """Check the members of the training's groups, and of every group that is opened later, whichever library opens it.

    Each group connects its ranks anew, through torch's store, which asks nobody who he is. Every rank calls this
    before any other exchange.

    Raises:
        CollectiveError: see ``check_members``.
    """
    check_members(token)
    if _host_group is not None:
        check_members(token, group=_host_group)

    def checked(*arguments: Any, **options: Any) -> Any:
        group: Any = _new_group(*arguments, **options)
        if dist.get_rank(group) != -1:  # else this rank is no member
            check_members(token, group=group)
        return group

    dist.new_group = distributed_c10d.new_group = checked


def check_members(token: str, *, group: Any = None) -> None:
    """End the training if a rank of a group does not know ``token``; every rank of it calls this first.

    A rank's answer depends on new random numbers and on its own rank, so an answer recorded earlier or taken from
    another rank is not valid. The token itself is not sent.

    Raises:
        CollectiveError: it names the ranks that do not know the token.
    """
    drawn = json.dumps(gather_json(secrets.token_hex(16), group=group))
    answers = gather_json(_answer(token, dist.get_rank(), drawn), group=group)
    unknown = [
        rank
        for rank, answer in zip(dist.get_process_group_ranks(group), answers, strict=True)
        if not hmac.compare_digest(str(answer).encode(errors="replace"), _answer(token, rank, drawn).encode())
    ]
    if unknown:
        raise CollectiveError(
            f"rank {', '.join(map(str, unknown))} joined this training without the token of its run (the file "
            f"rank-token in the run's folder, as rank {dist.get_rank()} reads it): either the ranks do not share one "
            "run folder, which they must, or a process that does not belong to the run has joined; then let only the "
            "cluster's machines reach its ports (docs/security.md)"
        )


def refuse_pickles() -> None:
    """Make torch's collectives of objects raise CollectiveError in this process, whichever library calls them."""
    distributed_c10d._unpickler = _refused


def _refused(file: Any) -> Any:
    raise CollectiveError(
        "a pickle arrived from another rank and was not opened; send JSON with launcher/training/collectives.py"
    )


def _answer(token: str, rank: int, drawn: str) -> str:
    return hmac.new(token.encode(), f"rank {rank}: {drawn}".encode(), hashlib.sha256).hexdigest()


def _device(group: Any = None) -> torch.device:
    """The device of a group's tensors: NCCL sends GPU tensors only."""
    on_gpu = dist.get_backend(group) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def _encode(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _check_sizes(sizes: dict[int, int]) -> None:
    for rank, size in sizes.items():
        if not 0 < size <= MAX_BYTES:
            raise CollectiveError(f"rank {rank} sent a size of {size:,} bytes, expected 1 to {MAX_BYTES:,}")


def _buffer(content: bytes, size: int, group: Any = None) -> torch.Tensor:
    buffer = torch.zeros(size, dtype=torch.uint8)
    if content:
        buffer[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return buffer.to(_device(group))


def _decode(buffer: torch.Tensor, size: int, rank: int) -> Any:
    content = buffer[:size].cpu().numpy().tobytes()
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CollectiveError(
            f"rank {rank} sent {size:,} bytes that are no JSON ({type(error).__name__}: {error}); "
            "nothing of it was used"
        ) from error


def agreed(compute: Callable[[], Any]) -> Any:
    """Rank 0's result of ``compute``, a JSON value, on every rank."""
    return broadcast_json(compute() if dist.get_rank() == 0 else None)
