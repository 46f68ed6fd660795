"""kernels/accumulate.py against reference.py; interpreted where there is no GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from kernels import reference
from kernels.accumulate import BLOCK, accumulate_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("shape", ((), (1,), (3, 7), (2, BLOCK), (5, BLOCK + 3), (0, 4)), ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_equals_reference_bitwise(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.full(shape, torch.nan, device=DEVICE) for _ in range(2))
    for number in range(3):
        gradient = torch.randn(shape, generator=generator).to(DEVICE, dtype)
        accumulate_(ours, gradient, number == 0)
        reference.accumulate_(theirs, gradient, number == 0)
        assert torch.equal(ours, theirs)


def test_a_transposed_gradient() -> None:
    gradient, ours = torch.randn(5, 7, device=DEVICE).bfloat16().t(), torch.ones(7, 5, device=DEVICE)
    accumulate_(ours, gradient, False)
    assert torch.equal(ours, 1 + gradient.float())


@pytest.mark.parametrize(
    ("total", "gradient", "name"),
    [
        (torch.zeros(2, 3).bfloat16(), torch.zeros(2, 3), "total"),
        (torch.zeros(3, 2).t(), torch.zeros(2, 3), "total"),
        (torch.zeros(2, 3), torch.zeros(3, 2), "gradient"),
        (torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int32), "gradient"),
        (torch.zeros(2, 3), torch.zeros(2, 3, device="meta"), "gradient"),
    ],
)
def test_bad_input_is_named(total: torch.Tensor, gradient: torch.Tensor, name: str) -> None:
    tensors = [t if t.is_meta else t.to(DEVICE) for t in (total, gradient)]
    with pytest.raises(ValueError, match=f"^{name}"):
        accumulate_(*tensors, False)
