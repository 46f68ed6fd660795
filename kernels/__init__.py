"""The operations around the matrix products and the optimizer, each in plain PyTorch (reference.py, the truth) and in Triton.

The model is given an `Operations`, and calls `ops.rms_norm(...)` without knowing who computes it. triton is imported only where
a Triton kernel is chosen, so that a machine without it runs the reference.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kernels import reference

GROUPS = {  # knob -> what it chooses
    "norm_kernel": ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm"),
    "swiglu_kernel": ("swiglu",),
    "gelu_kernel": ("gelu", "gelu_tanh"),
    "rope_kernel": ("rope", "rope_qkv_"),
    "cross_entropy_kernel": ("linear_cross_entropy",),
    "adamw_kernel": ("AdamW", "accumulate_", "average_"),
    "fp8_kernel": ("quantize", "transpose_bytes", "swiglu_quantize", "swiglu_backward_quantize"),
}


@dataclass(frozen=True)
class Operations:
    """Who computes what; signatures and formulas are reference.py's."""

    layer_norm: Callable[..., Any]
    rms_norm: Callable[..., Any]
    add_layer_norm: Callable[..., Any]
    add_rms_norm: Callable[..., Any]
    swiglu: Callable[..., Any]
    gelu: Callable[..., Any]
    gelu_tanh: Callable[..., Any]
    rope: Callable[..., Any]
    rope_qkv_: Callable[..., Any]
    linear_cross_entropy: Callable[..., Any]
    AdamW: Callable[..., Any]  # the optimizer
    accumulate_: Callable[..., Any]
    average_: Callable[..., Any]
    quantize: Callable[..., Any]
    transpose_bytes: Callable[..., Any]
    swiglu_quantize: Callable[..., Any]
    swiglu_backward_quantize: Callable[..., Any]


REFERENCE = Operations(**{name: getattr(reference, name) for names in GROUPS.values() for name in names})


def choose(choices: Mapping[str, str], device: str) -> tuple[Operations, dict[str, str]]:
    """(the operations, who computes them: knob -> triton or torch) for `choices` of auto, triton or torch by knob.

    auto is Triton where it can run. Raises ValueError where it is asked for and cannot.
    """
    possible = device == "cuda" and importlib.util.find_spec("triton") is not None
    asked = [knob for knob in GROUPS if choices[knob] == "triton"]
    if asked and not possible:
        raise ValueError(f"--{asked[0]}=triton needs a GPU and the triton package; pass --{asked[0]}=auto")
    best = "triton" if possible else "torch"
    chosen = {knob: best if choices[knob] == "auto" else choices[knob] for knob in GROUPS}
    ops = {who: triton_kernels() if who == "triton" else reference for who in set(chosen.values())}
    return Operations(**{name: getattr(ops[who], name) for knob, who in chosen.items() for name in GROUPS[knob]}), chosen


def triton_kernels() -> Operations:
    """All operations as Triton kernels."""
    from kernels.accumulate import accumulate_
    from kernels.adamw import AdamW
    from kernels.average import average_
    from kernels.cross_entropy import linear_cross_entropy
    from kernels.gelu import gelu, gelu_tanh
    from kernels.layer_norm import add_layer_norm, layer_norm
    from kernels.quantize import quantize, transpose_bytes
    from kernels.rms_norm import add_rms_norm, rms_norm
    from kernels.rope import rope, rope_qkv_
    from kernels.swiglu import swiglu
    from kernels.swiglu_quantize import swiglu_backward_quantize, swiglu_quantize

    norms = layer_norm, rms_norm, add_layer_norm, add_rms_norm
    fp8 = quantize, transpose_bytes, swiglu_quantize, swiglu_backward_quantize
    return Operations(*norms, swiglu, gelu, gelu_tanh, rope, rope_qkv_, linear_cross_entropy, AdamW, accumulate_, average_, *fp8)
