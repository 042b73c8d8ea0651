#!/usr/bin/env python3
"""The CUDA compiler, installed from Python wheels into a folder of the build.

Idempotent: does nothing where the pinned versions are there. No GPU, driver or installed toolkit is needed; a C++ compiler is.
"""

import hashlib
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "target" / "cuda"

# All of them are pinned, because the compiler's own requirements name no versions.
PINS = [
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
]


class ToolchainError(Exception):
    """The compiler is not there and could not be installed."""


def install():
    """Returns the path of nvcc, after installing it where it is missing or of other versions."""
    environment = FOLDER / "venv"
    stamp = environment / "pins.sha256"
    pins = hashlib.sha256("\n".join(PINS).encode()).hexdigest()
    if not (stamp.exists() and stamp.read_text() == pins):
        print(f"installing {len(PINS)} packages of the CUDA compiler into {environment.relative_to(ROOT)}")
        shutil.rmtree(environment, ignore_errors=True)
        try:
            venv.create(environment, with_pip=True)
            pip = [environment / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
            subprocess.run([*pip, "--no-deps", *PINS], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise ToolchainError(f"cannot install the CUDA compiler: {error}") from error
        stamp.write_text(pins)
    found = sorted(environment.glob("lib/python*/site-packages/nvidia/cu13/bin/nvcc"))
    if not found:
        raise ToolchainError(f"expected nvcc in {environment.relative_to(ROOT)}, found none")
    return found[0]


if __name__ == "__main__":
    try:
        print(install())
    except ToolchainError as failure:
        sys.exit(str(failure))
