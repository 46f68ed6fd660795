"""kernels/average.py against reference.py; interpreted where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton")
from kernels import reference
from kernels.average import BLOCK, average_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def parts(n: int, length: int, dtype: torch.dtype) -> torch.Tensor:
    """(n, length), with gaps between the rows as between a ring's places."""
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, length + 5, generator=generator).to(DEVICE, dtype)[:, :length]


@pytest.mark.parametrize("n", (1, 2, 7))
@pytest.mark.parametrize("length", (0, 1, 7, BLOCK, 2 * BLOCK + 3))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_equals_reference_bitwise(n: int, length: int, dtype: torch.dtype) -> None:
    own, arrived, factor = parts(1, length, dtype)[0], parts(n, length, dtype), 1 / (n + 1)
    ours, ours_too, theirs, theirs_too = (torch.full((length,), torch.nan, device=DEVICE) for _ in range(4))
    average_(ours, own, arrived, factor, ours_too)
    reference.average_(theirs, own, arrived, factor, theirs_too)
    assert torch.equal(ours, theirs) and torch.equal(ours_too, ours) and torch.equal(theirs_too, theirs)
    exact = factor * (own.double() + arrived.double().sum(0))
    torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("average", (average_, reference.average_))
@pytest.mark.parametrize("length", (1, 5))
def test_a_sum_in_place(average: Callable[..., None], length: int) -> None:
    own, arrived = torch.arange(3.0 * length, device=DEVICE)[::3], torch.ones(2, length, device=DEVICE)
    result = own.clone()
    average(result, result, arrived, 1.0)
    assert torch.equal(result, own + 2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("output", torch.zeros(4).bfloat16()),
        ("output", torch.zeros(5)),
        ("own", torch.zeros(4, dtype=torch.int32)),
        ("own", torch.zeros(4, device="meta")),
        ("arrived", torch.zeros(3, 5)),
        ("arrived", torch.zeros(4)),
        ("arrived", torch.zeros(3, 4).bfloat16()),
        ("arrived", torch.zeros(4, 3).t()),
        ("also", torch.zeros(4).half()),
        ("also", torch.zeros(8)),  # every other one, which is four
    ],
)
def test_bad_input_is_named(name: str, value: torch.Tensor) -> None:
    good = {"output": torch.zeros(4), "own": torch.zeros(4), "arrived": torch.zeros(3, 4), "also": torch.zeros(4)}
    tensors = {key: t if t.is_meta else t.to(DEVICE) for key, t in (good | {name: value}).items()}
    tensors["also"] = tensors["also"][:: len(tensors["also"]) // 4]
    with pytest.raises(ValueError, match=f"^{name}"):
        average_(tensors["output"], tensors["own"], tensors["arrived"], 1.0, tensors["also"])
