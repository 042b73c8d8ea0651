#!/usr/bin/env bash
# Everything that a machine with a GPU can check of this build: facts, start-up, answers beside those of the CPU and of
# transformers, memory errors, speed beside the machine's limits and that of others' code. Runs all of it, whatever fails,
# and ends in one table.
#
#   gpu-check.sh [WEIGHTS]    WEIGHTS: a folder of SmolLM2-135M-Instruct (config, tokenizer, safetensors); without
#                             it the checks that start a server are skipped
#
# OUT is the folder for every step's output (./results). KVERN is the binary (beside this file). DEVICE is cuda:0.
# CHECKS names the checks to run, by spaces (all): for a machine that is lent for minutes. Needs nvidia-smi, Python 3
# with torch and, for the answers, transformers; compute-sanitizer and FlashInfer where there are any.
set -uo pipefail

here=$(cd "$(dirname "$0")" && pwd)
scripts=$here/scripts/gpu
[ -d "$scripts" ] || scripts=$here
KVERN=${KVERN:-$here/kvern}
OUT=${OUT:-results}
DEVICE=${DEVICE:-cuda:0}
PYTHON=${PYTHON:-python3}
CHECKS=${CHECKS:-}
weights=${1:-}
mkdir -p "$OUT"
table=$OUT/table.txt
printf '%-28s %-22s %8s\n' check result seconds >"$table"
failures=0

# The row of a check.
row() {
    printf '%-28s %-22s %8s\n' "$1" "$2" "$3" >>"$table"
}

# check NAME SECONDS_MAX COMMAND...: runs a check; its output goes to a file of its name, its end to the terminal.
check() {
    run FAIL "$@"
}

# As check, of what may be reported without being wrong: it is in the table, and nothing fails by it.
inform() {
    run reported "$@"
}

# run WORD NAME SECONDS_MAX COMMAND...: WORD is what the table says of one that does not pass; FAIL counts.
run() {
    local word=$1 name=$2 limit=$3 began status result
    shift 3
    wanted "$name" || return 0
    echo "== $name"
    began=$SECONDS
    timeout --kill-after=10 "$limit" "$@" >"$OUT/$name.txt" 2>&1
    status=$?
    case $status in
    0) result=pass ;;
    124 | 137) result="$word: over $limit s" ;;
    *) result="$word: status $status" ;;
    esac
    [ "$status" -eq 0 ] || [ "$word" != FAIL ] || failures=$((failures + 1))
    tail -n 12 "$OUT/$name.txt"
    row "$name" "$result" $((SECONDS - began))
}

# Whether a check is among those asked for.
wanted() {
    case " ${CHECKS:-$1} " in
    *" $1 "*) return 0 ;;
    *) return 1 ;;
    esac
}

skip() {
    wanted "$1" || return 0
    echo "== $1: skipped, $2"
    row "$1" "skipped: $2" -
}

# check, if the weights are there.
answers() {
    if [ -n "$weights" ]; then check "$@"; else skip "$1" "no weights"; fi
}

if folder=$("$PYTHON" "$scripts/libraries.py" 2>"$OUT/libraries.txt"); then
    export LD_LIBRARY_PATH=${folder:+$folder:}${LD_LIBRARY_PATH:-}
    echo "libcublasLt: ${folder:-found by the loader}"
else
    cat "$OUT/libraries.txt"
fi

# Kernels of prompts' attention that this GPU can run.
prefills=(--prefill-kernel=portable)
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1)
[ "$capability" = 9.0 ] && prefills+=(--prefill-kernel=hopper)

bench() {
    local shape=$1
    shift
    check "bench-$shape" 900 "$PYTHON" "$scripts/roofline.py" --kvern "$KVERN" --model "$scripts/shapes/$shape" \
        --device "$DEVICE" --flag=--load-format=dummy --flag=--max-num-batched-tokens=8192 \
        "${prefills[@]}" --out "$OUT/bench-$shape.json" "$@"
}

# Decoding without and with launches that begin before the one before has ended.
launches() {
    local shape=$1
    check "launches-$shape" 600 "$PYTHON" "$scripts/roofline.py" --kvern "$KVERN" --model "$scripts/shapes/$shape" \
        --device "$DEVICE" --flag=--load-format=dummy --decode 1x1024 --decode 32x1024 \
        --again early=--programmatic-launches=on --out "$OUT/launches-$shape.json"
}

check gpu 60 nvidia-smi
facts=name,driver_version,memory.total,memory.used,clocks.sm,clocks.max.sm,clocks.mem,power.limit,mig.mode.current
check gpu-facts 60 nvidia-smi --query-gpu="$facts" --format=csv
check version 30 "$KVERN" --version
# Small, so that a build that does not open the device is known before anything long.
tiny=("$KVERN" bench "$scripts/shapes/smollm2-135m" --device "$DEVICE" --load-format dummy --rounds 1)
check opens 120 "${tiny[@]}" --steps 4 --decode 2x64 --prefill 96
# hopper NAME COMMAND...: with the kernel of prompts' attention for compute capability 9.0, where the GPU has it.
hopper() {
    local name=$1
    shift
    if [ "$capability" = 9.0 ]; then "$@" --prefill-attention hopper; else skip "$name" "not compute capability 9.0"; fi
}
hopper opens-hopper check opens-hopper 120 "${tiny[@]}" --steps 4 --decode 2x64 --prefill 96,700
served=(--kvern "$KVERN" --model "$weights" --device "$DEVICE" --logs "$OUT")
answers start 600 "$PYTHON" "$scripts/start.py" "${served[@]}" --shape "$scripts/shapes/llama-3.1-8b" --made \
    --out "$OUT/start.json"
if [ -x "$here/parity" ]; then
    check parity 600 env KVERN_TEST_GPU=1 "$here/parity" --test-threads=1
else
    skip parity "not in the bundle"
fi
answers serves 300 "$PYTHON" "$scripts/server.py" "${served[@]}"
answers cuda-and-cpu 900 "$PYTHON" "$scripts/devices.py" "${served[@]}"
answers transformers 900 "$PYTHON" "$scripts/agree.py" "${served[@]}"
answers early-launches 900 "$PYTHON" "$scripts/agree.py" "${served[@]}" --flag=--programmatic-launches=on
# A lone prompt, and many beside each other: steps go to and fro between a part of the GPU and all of it.
answers parts 900 "$PYTHON" "$scripts/agree.py" "${served[@]}" --mixed --flag=--workers=split \
    --flag=--decode-multiprocessors=48 --flag=--no-enable-prefix-caching
# sanitize check|inform NAME TOOL RUN...: a short run under a tool of compute-sanitizer.
sanitize() {
    local how=$1 name=$2 tool=$3
    shift 3
    if command -v compute-sanitizer >/dev/null; then
        "$how" "$name" 900 compute-sanitizer --tool "$tool" --error-exitcode 9 "${tiny[@]}" "$@"
    else
        skip "$name" "no compute-sanitizer"
    fi
}
for tool in memcheck racecheck synccheck; do
    sanitize check "$tool" "$tool" --steps 2 --decode 3x70 --prefill 100
done
for tool in memcheck synccheck; do
    hopper "$tool-hopper" sanitize check "$tool-hopper" "$tool" --steps 2 --prefill 300
done
# By its release notes racecheck knows copies in bulk since 2024.4, and reported races that are none where mbarriers or
# warpgroups order the accesses: fixes are noted in 2025.4, 2026.1 and, of the bytes that a copy completes, 2026.3. What
# the products of warpgroups read it does not say it sees at all. So a report is to be read, and silence proves little.
hopper racecheck-hopper sanitize inform racecheck-hopper racecheck --steps 2 --prefill 300
bench llama-3.1-8b --aims
bench llama-3.2-1b
bench qwen3-0.6b
peers=(--kvern "$KVERN" --model "$scripts/shapes/llama-3.1-8b" --device "$DEVICE")
check attention-llama-3.1-8b 900 "$PYTHON" "$scripts/attention.py" "${peers[@]}" --out "$OUT/attention-llama-3.1-8b.json"
check prompts-llama-3.1-8b 900 "$PYTHON" "$scripts/prompts.py" "${peers[@]}" "${prefills[@]}" --out "$OUT/prompts-llama-3.1-8b.json"
check sampling-llama-3.1-8b 600 "$PYTHON" "$scripts/sampling.py" "${peers[@]}" --out "$OUT/sampling-llama-3.1-8b.json"
check compiled-llama-3.1-8b 900 "$PYTHON" "$scripts/compiled.py" "${peers[@]}" --flag=--load-format=dummy \
    --flag=--max-num-batched-tokens=8192 --out "$OUT/compiled-llama-3.1-8b.json"
launches llama-3.1-8b
launches qwen3-0.6b
answers load 900 "$PYTHON" "$scripts/load.py" --kvern "$KVERN" --shape "$scripts/shapes/llama-3.1-8b" \
    --weights "$weights" --device "$DEVICE" --logs "$OUT" --out "$OUT/load.json"

echo
cat "$table"
if [ "$failures" -ne 0 ]; then
    echo "$failures failed; the output of each is in $OUT"
    exit 1
fi
