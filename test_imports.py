"""What this machine has: versions, GPUs, kernels, FP8, NCCL. `python test_imports.py` exits with 1 where training cannot run.

Not a test of pytest's (those are in tests/): run it first on a new machine, and paste its output into a bug report.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import re
import shutil
import sys
from pathlib import Path

from configurator import ROOT, run_command

WIDTH = 22  # of the first column


def main(argv: list[str]) -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    row("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores")
    missing = [
        name for path in ("requirements.txt", "requirements-gpu.txt") for name in packages(ROOT / path) if not report(name)
    ]
    required = [name for name in missing if name in packages(ROOT / "requirements.txt")]
    if "torch" not in missing:
        devices()
    row("C++ compiler", shutil.which(os.environ.get("CXX", "c++")) or "none: torch.compile on a CPU needs one")
    if required:
        print(f"\nMissing: {', '.join(required)}. Install them with: pip install -r requirements.txt", file=sys.stderr)
    return 1 if required else 0


def row(name: str, text: str) -> None:
    print(f"{name:{WIDTH}s}{text}")


def packages(path: Path) -> dict[str, str]:
    """Package name -> pinned version of a requirements file."""
    pins = (re.match(r"([\w-]+)(?:\[\w+\])?==([\w.]+)", line) for line in path.read_text(encoding="utf-8").splitlines())
    return {pin[1]: pin[2] for pin in pins if pin}


def report(name: str) -> bool:
    """Print the installed version beside the pinned one; False where the package is missing."""
    pinned = (packages(ROOT / "requirements.txt") | packages(ROOT / "requirements-gpu.txt"))[name]
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        row(name, f"missing (pinned: {pinned})")
        return False
    row(name, version + ("" if version.split("+")[0] == pinned else f" (pinned: {pinned})"))
    return True


def devices() -> None:
    """GPUs with their peak rate, and what PyTorch was built with."""
    import torch

    from flops import peak_tflops

    row("CUDA in PyTorch", torch.version.cuda or "none: this is a CPU build")
    row("cuDNN", str(torch.backends.cudnn.version() or "none"))
    nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    row("NCCL", ".".join(map(str, torch.cuda.nccl.version())) if nccl else "none")
    if not torch.cuda.is_available():
        row("GPUs", "none: training runs on the CPU")
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        peak = peak_tflops(gpu.name, "bfloat16")
        rate = f"{peak:g} TFLOP/s dense bfloat16" if peak else "peak rate not known, so no MFU"
        fp8 = "FP8" if (gpu.major, gpu.minor) >= (8, 9) else "no FP8"
        row(f"cuda:{index}", f"{gpu.name}, {gpu.total_memory / 1e9:.1f} GB, {rate}, {fp8}")


if __name__ == "__main__":
    run_command(main)
