"""Without a GPU the tests run Triton's kernels in its interpreter, which Triton must be told before anything imports it."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
