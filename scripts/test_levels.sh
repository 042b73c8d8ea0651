#!/usr/bin/env bash
# The tests of whole models, of batches and of the server's clients, with the CPU's kernels held to one instruction set after the
# other, each that this machine has: references in F32 and quantized (transformers, llama.cpp, candle), the same text in any
# batch, and the published OpenAI clients.
#
# LEVELS names the instruction sets, lowest first.
set -euo pipefail
cd "$(dirname "$0")/.."

cargo test --workspace --no-run --quiet
for level in ${LEVELS:-scalar avx2 avx512 amx}; do
    export KVERN_CPU_ISA=$level
    if ! found=$(target/debug/kvern bench --prefill 1 --rounds 1 2>&1); then
        case $found in
            *"expected a machine with"*) echo "$level: this machine does not have it"; continue ;;
            *) echo "$found" >&2; exit 1 ;;
        esac
    fi
    echo "$level: models, batches, clients"
    cargo test --quiet -p kvern-models --test golden
    cargo test --quiet -p kvern-models --test oracle
    cargo test --quiet -p kvern --test batching
    KVERN_BIN=target/debug/kvern scripts/run_clients.sh
done
