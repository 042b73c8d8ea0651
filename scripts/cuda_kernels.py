#!/usr/bin/env python3
"""Compiles kernels/cuda/*.cu: the one place that knows how.

Each file becomes target/cuda/fatbin/NAME.fatbin with machine code for sm_80 and sm_90a and PTX for compute_80, from which the
driver makes code for any later GPU. A file is compiled again when its text, a header, the flags or the compiler's version change.

What the compiler says of every kernel is compared with kernels/cuda/resources.txt: more registers or static shared memory than there, any
spill, or the loss of 128-bit loads (wide) or stores, matrix instructions (mma, wgmma) or asynchronous copies (async, tma) is an error.
--accept writes that table anew. So is an access to memory before a kernel has waited for the launches before it, and a remark of the
assembler that wgmma runs one at a time. Dynamic shared memory is the launch's: a test of kvern-cuda-abi adds it to this table's.

Without a compiler, and with no way to install one, this warns and does nothing, unless KVERN_REQUIRE_CUDA=1.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cuda_toolchain

ROOT = cuda_toolchain.ROOT
SOURCES = ROOT / "kernels" / "cuda"
TABLE = SOURCES / "resources.txt"
FATBINS = cuda_toolchain.FOLDER / "fatbin"

TARGETS = [
    "-gencode=arch=compute_80,code=[sm_80,compute_80]",
    "-gencode=arch=compute_90a,code=sm_90a",
]
FLAGS = [
    "--fatbin",
    "--std=c++17",
    "-O3",
    "--Werror=all-warnings",
    "-Xptxas=-v,-warn-spills",
    "-Xcompiler=-Wall,-Wextra",
    "--compress-mode=size",
]
# What the PTX of a kernel may hold, and must not lose.
FEATURES = {
    "wide": re.compile(r"\b(ld\.global[.\w:]*\.v4\.|ld\.v4\.|cp\.async\.cg)"),
    "stores": re.compile(r"\bst(\.global)?[.\w:]*\.v4\."),
    "mma": re.compile(r"\bmma\.sync\."),
    "async": re.compile(r"\bcp\.async\.cg"),
    "wgmma": re.compile(r"\bwgmma\.mma_async\."),
    "tma": re.compile(r"\bcp\.async\.bulk\.tensor\."),
}
# Where a launch may begin early a kernel waits for those before, and touches no memory until then but by prefetches.
TURN = "griddepcontrol.wait;"
ACCESS = re.compile(r"^\s*(?:@!?%p\d+\s+)?((?:ld|st|red|atom|cp)\.(?!param|const|shared)\S+)", re.MULTILINE)
# Remarks of the assembler on wgmma, such as C7510: its instructions are serialized. They are information, no warnings, but a kernel that
# waits for each product is not the one that was meant.
SERIALIZED = re.compile(r"^.*\bC75\d\d\b.*$", re.MULTILINE)
HEADER = f"# {'kernel':40} {'target':8} {'registers':>9} {'shared':>7} {'spills':>6}  features"


def digest(source):
    """Of everything that the result depends on."""
    parts = [source, *sorted(SOURCES.glob("*.h"))]
    text = b"".join(part.name.encode() + b"\0" + part.read_bytes() + b"\0" for part in parts)
    settings = (TARGETS, FLAGS, FEATURES, TURN, ACCESS, SERIALIZED, cuda_toolchain.PINS)
    return hashlib.sha256(text + repr(settings).encode()).hexdigest()


def features(ptx):
    """Kernel name -> what its PTX holds."""
    found = {}
    for body in re.split(r"\.entry ", ptx)[1:]:
        name = re.match(r"\w+", body)[0]
        found[name] = [feature for feature, pattern in FEATURES.items() if pattern.search(body)]
    return found


def out_of_turn(ptx):
    """What kernels for sm_90 on do to memory before they have waited for the launches before."""
    if not re.search(r"^\.target sm_90", ptx, re.MULTILINE):
        return
    for body in re.split(r"\.entry ", ptx)[1:]:
        name = re.match(r"\w+", body)[0]
        before, waits, _ = body.partition(TURN)
        if not waits:
            yield f"{name} does not wait for the launches before"
        elif access := ACCESS.search(before):
            yield f"{name} has {access[1]} before it waits for the launches before"


def serialized(log):
    """Remarks in ptxas' report that wgmma does not run as it was written."""
    return [line.strip() for line in SERIALIZED.findall(log)]


def resources(log):
    """Rows (kernel, target, registers, static shared bytes, spilled bytes) of ptxas' report."""
    rows, kernel, spills = [], None, 0
    for line in log.splitlines():
        if entry := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            kernel, spills = entry.groups(), 0
        elif spill := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spills = sum(map(int, spill.groups()))
        elif kernel and (used := re.search(r"Used (\d+) registers", line)):
            shared = re.search(r"(\d+) bytes smem", line)
            rows.append([*kernel, int(used[1]), int(shared[1]) if shared else 0, spills])
            kernel = None
    return rows


def compile_one(nvcc, source):
    """Compiles a file, or finds that nothing changed; returns its rows with their features."""
    name, fingerprint = source.stem, digest(source)
    report = FATBINS / f"{name}.json"
    if report.exists() and (FATBINS / f"{name}.fatbin").exists():
        known = json.loads(report.read_text())
        if known["digest"] == fingerprint:
            return known["rows"]
    keep = cuda_toolchain.FOLDER / "keep" / name
    shutil.rmtree(keep, ignore_errors=True)
    keep.mkdir(parents=True)
    started = time.monotonic()
    target = FATBINS / f"{name}.fatbin"
    # What was refused must not be there for the server's build to take.
    target.unlink(missing_ok=True)
    made = keep / "made.fatbin"
    command = [nvcc, *FLAGS, *TARGETS, "--keep", f"--keep-dir={keep}", "-o", made, source]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{source.name} does not compile:\n{done.stdout}{done.stderr}")
    log = done.stdout + done.stderr
    if remarks := serialized(log):
        raise SystemExit(f"{source.name}:\n  " + "\n  ".join(remarks))
    holds = {}
    for ptx in keep.glob("*.ptx"):
        text = ptx.read_text()
        if wrong := list(out_of_turn(text)):
            raise SystemExit(f"{source.name}:\n  " + "\n  ".join(wrong))
        made_for = re.search(r"^\.target (sm_\w+)", text, re.MULTILINE)[1]
        for kernel, found in features(text).items():
            holds[kernel, made_for] = found
    rows = [[*row, holds[row[0], row[1]]] for row in resources(log)]
    if not rows:
        raise SystemExit(f"{source.name}: expected a report on kernels, found none")
    made.replace(target)
    shutil.rmtree(keep)
    report.write_text(json.dumps({"digest": fingerprint, "rows": rows}))
    print(f"{source.name}: {len(rows)} kernels in {time.monotonic() - started:.0f} s, {target.stat().st_size} bytes")
    return rows


def format_row(row):
    kernel, target, registers, shared, spills, found = row
    return f"  {kernel:40} {target:8} {registers:9} {shared:7} {spills:6}  {' '.join(found) or '-'}"


def parse_table(text):
    """(kernel, target) -> (registers, static shared bytes, features)."""
    rows = (line.split() for line in text.splitlines() if line and not line.startswith("#"))
    return {(row[0], row[1]): (int(row[2]), int(row[3]), set(row[5:]) - {"-"}) for row in rows}


def complaints(rows, table):
    """What is worse than the table says."""
    found = {(row[0], row[1]) for row in rows}
    for kernel, target in sorted(table.keys() - found):
        yield f"{kernel} for {target} is in the table and was not compiled"
    for kernel, target, registers, shared, spills, holds in rows:
        if spills:
            yield f"{kernel} for {target} spills {spills} bytes"
        if (kernel, target) not in table:
            yield f"{kernel} for {target} is not in the table"
            continue
        registers_max, shared_max, needed = table[kernel, target]
        if registers > registers_max:
            yield f"{kernel} for {target}: expected at most {registers_max} registers, found {registers}"
        if shared > shared_max:
            yield f"{kernel} for {target}: expected at most {shared_max} bytes of static shared memory, found {shared}"
        if lost := needed - set(holds):
            yield f"{kernel} for {target} has lost: {', '.join(sorted(lost))}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--accept", action="store_true", help="write the table of resources anew")
    parser.add_argument("--quiet", action="store_true", help="do not print the table")
    arguments = parser.parse_args()
    try:
        nvcc = cuda_toolchain.install()
    except cuda_toolchain.ToolchainError as error:
        if os.environ.get("KVERN_REQUIRE_CUDA") == "1":
            sys.exit(str(error))
        print(f"warning: {error}; no CUDA kernels are built", file=sys.stderr)
        return
    FATBINS.mkdir(parents=True, exist_ok=True)
    sources = sorted(SOURCES.glob("*.cu"))
    for old in FATBINS.iterdir():
        if old.stem not in {source.stem for source in sources}:
            old.unlink()
    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        rows = sorted(row for rows in pool.map(lambda source: compile_one(nvcc, source), sources) for row in rows)
    lines = [HEADER, *map(format_row, rows)]
    if not arguments.quiet:
        print("\n".join(lines))
    if arguments.accept:
        TABLE.write_text("\n".join(lines) + "\n")
    worse = list(complaints(rows, parse_table(TABLE.read_text()) if TABLE.exists() else {}))
    if worse:
        sys.exit("kernels/cuda/resources.txt does not hold (make cuda ARGS=--accept takes these as the new limits, but no spill):\n  "
                 + "\n  ".join(worse))
    size = sum(file.stat().st_size for file in FATBINS.glob("*.fatbin"))
    print(f"{len(rows)} kernels in {len(sources)} files hold; {size / 1024:.0f} KiB of fatbins")


if __name__ == "__main__":
    main()
