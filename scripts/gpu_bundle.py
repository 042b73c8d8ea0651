#!/usr/bin/env python3
"""Gathers what a machine with a GPU, without Rust and network, needs to check this build into target/gpu-bundle.

    kvern              the release build with the feature cuda and its kernels, stripped
    parity             the tests of every op, to be run on a GPU (--no-parity leaves them out: they take minutes to compile)
    gpu-check.sh       runs everything and ends in one table
    scripts            what that script runs, and configurations for made-up weights
    BUNDLE.txt         commit, day, versions, checksum of the binary

Fails where the binary is larger than 45 MiB or the bundle larger than 60 MiB. --kvern takes a binary that is built.
"""

import argparse
import datetime
import hashlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import cuda_toolchain

ROOT = cuda_toolchain.ROOT
BUNDLE = ROOT / "target" / "gpu-bundle"
SCRIPTS = ROOT / "scripts" / "gpu"
# The scripts that Dockerfile.cuda runs.
IMAGE = ROOT / "scripts" / "docker"
# What they use that others use too.
SHARED = [ROOT / "scripts" / "streaming.py"]
MIB = 1 << 20
BINARY_BYTES_MAX = 45 * MIB
BUNDLE_BYTES_MAX = 60 * MIB


def run(*command) -> str:
    """What a command prints; its failure is this script's."""
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))} ended with {done.returncode}")
    return done.stdout.strip()


def build() -> pathlib.Path:
    """The release build with all kernels in it, made as for the image."""
    print(run(IMAGE / "kernels.sh"))
    with_cuda = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "with-cuda"
    print(run(IMAGE / "build.sh", with_cuda))
    return with_cuda / "kvern"


def parity() -> pathlib.Path:
    """The tests of every op, as a program."""
    cargo = os.environ.get("CARGO", "cargo")
    built = run(cargo, "test", "--release", "--locked", "--package", "kvern-cuda-shim", "--features", "cuda", "--test", "ops",
                "--no-run", "--message-format=json")
    messages = (json.loads(line) for line in built.splitlines() if line.startswith("{"))
    programs = [m["executable"] for m in messages if m.get("executable") and m["target"]["name"] == "ops"]
    if len(programs) != 1:
        sys.exit(f"expected one program of the tests of ops, found {programs}")
    return pathlib.Path(programs[0])


def libc_min(binary: bytes) -> str:
    """The C library's version that the binary asks for."""
    found = {tuple(map(int, version.split(b"."))) for version in re.findall(rb"GLIBC_(\d+\.\d+(?:\.\d+)?)", binary)}
    return ".".join(map(str, max(found))) if found else "none"


def facts(binary: bytes) -> str:
    rows = {
        "commit": run("git", "describe", "--always", "--dirty", "--abbrev=12"),
        "day": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "compiler of kernels": ", ".join(cuda_toolchain.PINS),
        "compiler": run(os.environ.get("RUSTC", "rustc"), "--version"),
        "C library, at least": libc_min(binary),
        "kvern, bytes": str(len(binary)),
        "kvern, sha256": hashlib.sha256(binary).hexdigest(),
    }
    return "".join(f"{name:22} {value}\n" for name, value in rows.items())


def gather(built: pathlib.Path, tests: "pathlib.Path | None") -> None:
    shutil.rmtree(BUNDLE, ignore_errors=True)
    shutil.copytree(SCRIPTS, BUNDLE / "scripts" / "gpu", ignore=shutil.ignore_patterns("__pycache__", "gpu-check.sh"))
    for script in SHARED:
        shutil.copy2(script, BUNDLE / "scripts")
    shutil.copy2(SCRIPTS / "gpu-check.sh", BUNDLE)
    run(os.environ.get("STRIP", "strip"), "--strip-all", "-o", BUNDLE / "kvern", built)
    if tests:
        run(os.environ.get("STRIP", "strip"), "--strip-all", "-o", BUNDLE / "parity", tests)
    binary = (BUNDLE / "kvern").read_bytes()
    (BUNDLE / "BUNDLE.txt").write_text(facts(binary))
    size = sum(file.stat().st_size for file in BUNDLE.rglob("*") if file.is_file())
    print(f"{BUNDLE.relative_to(ROOT)}: kvern {len(binary) / MIB:.1f} MiB, {size / MIB:.1f} MiB in all")
    for name, found, most in (("kvern", len(binary), BINARY_BYTES_MAX), ("the bundle", size, BUNDLE_BYTES_MAX)):
        if found > most:
            sys.exit(f"expected {name} of at most {most / MIB:.0f} MiB, found {found / MIB:.1f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kvern", type=pathlib.Path, help="a binary that is built already, with the feature cuda")
    parser.add_argument("--no-parity", action="store_true", help="leave the tests of ops out")
    options = parser.parse_args()
    built = options.kvern or build()
    gather(built, None if options.no_parity else parity())


if __name__ == "__main__":
    main()
