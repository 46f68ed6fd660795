"""The operations around the matrix products. The model calls them as `kernels.rms_norm(...)` and does not know who computes them.

reference.py is plain PyTorch and the truth that every faster version is compared with.
"""

from kernels.reference import cross_entropy, layer_norm, rms_norm, rope, swiglu

__all__ = ["cross_entropy", "layer_norm", "rms_norm", "rope", "swiglu"]
