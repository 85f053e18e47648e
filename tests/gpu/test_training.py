"""Training on a GPU: the step, and ranks under torchrun with NCCL."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.gpu


def test_a_step_waits_for_the_device_only_where_it_must(part, asserted):
    asserted(part("training"), "a step waits nowhere", "every loss is finite", at_least=2)


def test_every_switch_that_changes_no_number_gives_the_same_loss(part, asserted):
    asserted(part("training"), "switches that change no number")


def test_steps_by_graphs_have_the_losses_and_gradient_norms_of_steps_without(part, asserted):
    asserted(part("training"), "graphs compute the losses", at_least=2)


def test_zero_1_2_and_3_have_the_same_losses_in_fp32_and_in_bf16(part, asserted):
    asserted(part("zero"), "as with ZeRO-1", "the loss falls", at_least=12)


def test_a_resumed_training_is_bit_equal(part, asserted):
    asserted(part("zero"), "a resumed training is bit-equal")


def test_sigterm_leaves_a_checkpoint_and_ends_with_its_status(part, asserted):
    asserted(part("zero"), "SIGTERM", at_least=2)


def test_the_peak_of_memory_is_counted_for_every_case(part, asserted):
    asserted(part("memory"), "memory was counted", at_least=4)


def test_a_training_reads_its_data_by_no_and_by_two_loader_processes(part, asserted):
    asserted(part("loaders"), "every loss is finite", at_least=2)


def test_the_hang_guard_ends_a_process_whose_gpu_does_not_answer(part, asserted):
    asserted(part("hang"), "status 1", "of the limit", "names the line", "afterwards", at_least=4)
