"""Errors of shards."""

from __future__ import annotations

from mmcot.errors import OperationError


class ShardError(OperationError):
    """A shard or its index is missing or not valid; the message names the file."""
