"""Loss scaling follows overflows, and dtype names mean what they say."""

from __future__ import annotations

import pytest
import torch

from precision import LossScale, autocast, choose_dtype

CPU = torch.device("cpu")


def test_float16_scale_halves_on_overflow_and_doubles_after_good_steps():
    scale = LossScale(torch.float16, CPU)
    scale.update(torch.tensor(1.0))
    assert scale.scale == 2.0**15 and scale.good_steps == 0
    for _ in range(LossScale.GROWTH_INTERVAL - 1):
        scale.update(torch.tensor(0.0))
    assert scale.scale == 2.0**15
    scale.update(torch.tensor(0.0))
    assert scale.scale == 2.0**16 and scale.good_steps == 0
    assert set(scale.tensors()) == {"loss_scale.scale", "loss_scale.good_steps"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_have_no_scale(dtype):
    scale = LossScale(dtype, CPU)
    scale.update(torch.tensor(1.0))
    assert scale.scale == 1 and scale.tensors() == {}


def test_auto_is_float32_on_a_cpu():
    assert choose_dtype("auto", CPU) is torch.float32
    assert choose_dtype("bfloat16", CPU) is torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_rounds_matrix_products_only_where_asked(dtype):
    with autocast(CPU, dtype):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is dtype
