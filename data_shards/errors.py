"""Errors of shards."""

from __future__ import annotations


class ShardError(RuntimeError):
    """A shard or its index is missing or not valid; the message names the file."""
