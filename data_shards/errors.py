"""Errors of shards."""

from __future__ import annotations


class ShardError(RuntimeError):
    """A shard or its index cannot be trusted; the message names the file."""
