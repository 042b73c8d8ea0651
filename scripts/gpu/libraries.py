#!/usr/bin/env python3
"""Prints the folder of libcublasLt, a toolkit's or a Python package's, where the loader does not find it by itself."""

import argparse
import ctypes
import os
import pathlib
import sys
import sysconfig

NAMES = ("libcublasLt.so.13", "libcublasLt.so.12")


def loads(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def folders() -> "list[pathlib.Path]":
    toolkits = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    parts = ("lib64", "targets/x86_64-linux/lib")
    found = [pathlib.Path(toolkit) / part for toolkit in toolkits if toolkit for part in parts]
    packages = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path} - {""}
    return found + [folder for package in sorted(packages) for folder in pathlib.Path(package).glob("nvidia/*/lib")]


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    if any(loads(name) for name in NAMES):
        return
    for name in NAMES:
        for folder in folders():
            if loads(str(folder / name)):
                print(folder)
                return
    sys.exit(f"expected one of {', '.join(NAMES)}, found none")


if __name__ == "__main__":
    main()
