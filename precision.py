"""The number format of the arithmetic: dtype, autocast and loss scaling.

The optimizer and what it updates stay in float32; autocast rounds the operands of matrix products to `dtype`, where sharding.py
has not made them parameters in it. float16 has too few exponent bits for small gradients, so its loss is multiplied by a scale
that follows the gradients' range.
"""

from __future__ import annotations

import torch

from configurator import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of a run; `auto` is bfloat16 where the GPU has it, float16 on older GPUs, float32 on a CPU.

    Raises UserError for bfloat16 on a GPU without it.
    """
    has_bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if name == "auto":
        return torch.float32 if device.type != "cuda" else torch.bfloat16 if has_bf16 else torch.float16
    if name == "bfloat16" and device.type == "cuda" and not has_bf16:
        raise UserError(f"--dtype: {torch.cuda.get_device_name(device)} has no bfloat16; pass --dtype=float16")
    return DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """Such as float32."""
    return str(dtype).removeprefix("torch.")


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """The context of every forward pass; float32 leaves it off."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


class LossScale:
    """The factor on the loss: 1, or for float16 a power of two that halves on overflow and doubles after 2,000 good steps.

    All of it lives on the device, so that no step waits for the host. (Micikevicius et al. 2018, section 4.)
    """

    GROWTH_INTERVAL = 2000  # steps without an overflow after which a larger scale is tried

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.enabled = dtype == torch.float16
        self.scale = torch.tensor(2.0**16 if self.enabled else 1.0, device=device)
        self.good_steps = torch.zeros((), device=device)

    def update(self, overflow: torch.Tensor) -> None:
        """`overflow`: float32 scalar on the device, 1 where the step's gradient was not finite."""
        if not self.enabled:
            return
        self.good_steps.add_(1).mul_(1 - overflow)
        grow = (self.good_steps >= self.GROWTH_INTERVAL).float()
        self.scale.mul_((1 - 0.5 * overflow) * (1 + grow))
        self.good_steps.mul_(1 - grow)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps, by name."""
        return {"loss_scale.scale": self.scale, "loss_scale.good_steps": self.good_steps} if self.enabled else {}
