"""Decoding with captured graphs."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.gpu


def test_captured_graphs_and_plain_cuda_write_the_cpus_ids(part, asserted):
    asserted(part("decoding"), "writes the CPU's ids", "not one token repeated", at_least=3)


def test_decoding_waits_for_the_device_only_where_it_must(part, asserted):
    asserted(part("decoding"), "the host waits", at_least=2)
