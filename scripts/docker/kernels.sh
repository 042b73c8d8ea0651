#!/bin/sh
# Compiles the CUDA kernels; a layer of its own, because they change less often than the server.
set -eu

KVERN_REQUIRE_CUDA=1 python3 scripts/cuda_kernels.py --quiet
