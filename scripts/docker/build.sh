#!/bin/sh
# build.sh FOLDER: builds the server with CUDA and its kernels and puts the stripped binary into FOLDER.
set -eu

folder=$1
KVERN_REQUIRE_CUDA=1 "${CARGO:-cargo}" build --release --locked --package kvern --features cuda
mkdir -p "$folder"
"${STRIP:-strip}" --strip-all -o "$folder/kvern" "${CARGO_TARGET_DIR:-target}/release/kvern"
"$folder/kvern" --version
