# Every command of the project is one target; `make help` lists them.
CARGO ?= cargo
PYTHON ?= python3
# For `make serve`: a model other than the default, and further flags, as in `make serve ARGS="--port 9000"`; ARGS also for the
# scripts of the bench-* targets, as in `make bench-peer ARGS="--only prefill --rounds 3"`.
MODEL ?=
ARGS ?=
SEEDS ?= 1000000
# Compiles in a quarter of the time, for tests that compute nothing.
QUICK = --config 'profile.dev.package."*".opt-level=0' --config profile.dev.package.kvern-kernels.opt-level=0
BENCHES ?= forward plan prefix kernels frontend text

.DEFAULT_GOAL := help
.PHONY: help serve model test unit test-scripts clients sim simulate lint test-levels bench bench-peer bench-scaling bench-serve openapi doc cuda cuda-driver gpu-bundle docker-lint

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

serve: model ## Serve the default model (or MODEL=...) on port 8000
	$(CARGO) run --release -- serve $(MODEL) $(ARGS)

model: ## Fetch the default model, check its sha256; does nothing when it is there
	$(PYTHON) scripts/fetch_model.py

test: unit test-scripts clients ## Run all tests

unit: model ## Run the Rust tests
	$(CARGO) test --workspace

test-scripts: ## Test the scripts
	PYTHONPATH=scripts:scripts/gpu $(PYTHON) -m unittest discover -s tests/scripts

clients: model ## Run openai-python and openai-node, as published, against a running server
	scripts/run_clients.sh

test-levels: model ## Run models, batches and clients at every instruction set that the machine has; LEVELS="avx2" for some
	scripts/test_levels.sh

sim: ## Run the scheduler's simulator in a release build, SEEDS=1000000 of them
	KVERN_SIM_SEEDS=$(SEEDS) $(CARGO) test --release -p kvern-core --lib sim

simulate: ## Simulate a million requests of a synthetic trace in a release build; ARGS for others, as docs/simulate.md says
	$(CARGO) run --release -- simulate $(or $(ARGS),synthetic:azure --requests 1000000)

lint: ## Check the formatting, clippy, the docs and the scripts; warnings are errors
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps --document-private-items
	$(PYTHON) -m compileall -q scripts tests

bench: model ## Run the benchmarks, each beside its peer in the same run
	$(CARGO) bench --workspace $(addprefix --bench ,$(BENCHES))

bench-peer: model ## Build llama.cpp and measure Kvern beside it; ARGS=--help says how to run a part
	$(PYTHON) scripts/bench_peer.py $(ARGS)

bench-scaling: model ## Measure batches and contexts; writes docs/performance.md and its plot
	$(PYTHON) scripts/bench_scaling.py $(ARGS)

bench-serve: model ## Load the server: fairness, overload, latency, split workers; ARGS="--only load" for ten minutes with a replay
	$(PYTHON) scripts/bench_serve.py $(ARGS)

cuda: ## Compile the CUDA kernels (no GPU needed) and compare their resources; ARGS=--accept takes new ones
	$(PYTHON) scripts/cuda_kernels.py $(ARGS)

cuda-driver: ## Check and test the driver behind the feature cuda, and the HTTP API beside it, as far as that goes without a GPU
	$(CARGO) $(QUICK) clippy -p kvern-kernels --features cuda --all-targets -- -D warnings
	$(CARGO) $(QUICK) test -p kvern-kernels --features cuda --lib cuda_driver
	$(CARGO) $(QUICK) test -p kvern --features cuda --test http

gpu-bundle: ## Build target/gpu-bundle: server, kernels and scripts for a check on a machine with a GPU (docs/gpu/README.md)
	$(PYTHON) scripts/gpu_bundle.py $(ARGS)

docker-lint: ## Check Dockerfile.cuda and the shell scripts
	$(PYTHON) scripts/docker_lint.py

openapi: ## Write docs/openapi.json anew from the code
	KVERN_WRITE_OPENAPI=1 $(CARGO) test --test http openapi

doc: ## Build the API documentation and open it
	$(CARGO) doc --workspace --no-deps --open
