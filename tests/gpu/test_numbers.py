"""What a GPU computes is what the CPU computes."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.gpu


def test_fp32_is_within_1e_5_of_float64_on_the_cpu(part, asserted):
    asserted(part("golden"), "fp32:", at_least=6)


def test_bf16_is_within_2e_2_of_float64_on_the_cpu(part, asserted):
    asserted(part("golden"), "bf16:", at_least=6)


def test_neither_matrix_products_nor_convolutions_use_tf32_by_default(part, asserted):
    asserted(part("ceilings"), "do not use TF32", at_least=2)


def test_the_product_never_takes_cudnns_attention(part, asserted):
    asserted(part("attention"), "never takes cuDNN's attention", "attention is one operator", at_least=2)


def test_gradients_of_masked_attention_are_finite_with_cudnn_off(part, asserted):
    asserted(part("attention"), "gradients of masked attention are finite")


def test_vision_features_equal_the_cpus(part, asserted):
    asserted(part("features"), "of the CPU's")
