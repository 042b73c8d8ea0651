#!/bin/sh
# cublas.sh FOLDER: puts libcublasLt, and nothing else of cuBLAS, into FOLDER. It comes from NVIDIA's Python package,
# because the Debian package brings all of cuBLAS and a repository to trust.
set -eu

VERSION=13.0.2.14
folder=$1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip --disable-pip-version-check download --quiet --no-deps --only-binary :all: \
    --dest "$work" "nvidia-cublas==$VERSION"
python3 -m zipfile --extract "$work"/nvidia_cublas-*.whl "$work/wheel"
mkdir -p "$folder"
install -m 0755 "$work/wheel/nvidia/cu13/lib/libcublasLt.so.13" "$folder/"
