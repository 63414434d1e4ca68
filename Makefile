# The two commands of a fresh machine are `make demo` and `make test`. Everything else they need, they make.

PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-quick test-versions test-models conformance soak soak-real bench bench-routing lint format engine clean

demo: engine
	@$(BIN)/pd-launch up --model tiny

test: engine
	@$(BIN)/pytest

# Half an hour of mixed load with random faults, on simulated nodes: make soak SOAK_S=1800
SOAK_S ?= 1800
soak: .venv/installed
	@SOAK_S=$(SOAK_S) $(BIN)/pytest -s tests/proxy/test_soak.py

# A death at each stage of a request on real nodes; then the soak on two and two, whose processes are killed and stopped
# in turn (16 GB of memory).
soak-real: engine
	@SOAK_S=$(SOAK_S) $(BIN)/pytest -s tests/e2e/stages.py tests/e2e/soak.py

# Without real engines: seconds instead of minutes.
test-quick: .venv/installed
	@$(BIN)/pytest --ignore tests/e2e

# Which versions of vLLM this works with, on real nodes: make test-versions VERSIONS="0.31.0 0.30.0"
test-versions: .venv/installed
	@$(BIN)/python -m tests.versions $(VERSIONS)

# Models of every kind, made on the spot, on real nodes: twenty minutes. One kind: make test-models KIND=hybrid
test-models: engine
	@$(BIN)/pytest tests/models/kinds.py $(if $(KIND),-k $(KIND))

# What the proxy costs, side by side with its peers, which get an environment of their own in the user's cache folder.
BENCH_FLAGS ?= --install --chart bench.png
bench: .venv/installed
	@$(BIN)/pip install -q --editable '.[bench]'
	@$(BIN)/python -m tests.bench $(BENCH_FLAGS)

# Which router sends prompts where they are computed soonest, on simulated nodes: an hour; make bench-routing
# ROUTING_FLAGS="--install --cases trace:0.9" for a part of it.
ROUTING_FLAGS ?= --install
bench-routing: .venv/installed
	@$(BIN)/python -m tests.bench.routing $(ROUTING_FLAGS)

# Other people's suites against a node alone and against the proxy, each in an environment of its own in the user's cache
# folder: half an hour. Some of them: make conformance SUITES="openai langchain"
conformance: engine
	@$(BIN)/python -m tests.conformance.run $(SUITES)

lint: .venv/installed
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

format: .venv/installed
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

# vLLM and Mooncake, in an environment of their own in the user's cache folder; quick when it is there.
engine: .venv/installed
	@$(BIN)/pd-launch setup

.venv/installed: pyproject.toml
	@echo "making .venv (pip's output: .venv/pip.log)"
	@$(PYTHON) -c 'import sys; sys.exit("pd-launch needs Python 3.11 or newer, this is " + sys.version.split()[0] + ". Name another: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "Python cannot make virtual environments here; as root: apt-get install -y python3-venv"; exit 1; }
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install --editable '.[test]' > .venv/pip.log 2>&1 & pid=$$!; \
	  while kill -0 $$pid 2>/dev/null; do sleep 5; kill -0 $$pid 2>/dev/null && tail -n 1 .venv/pip.log | cut -c1-100; done; \
	  wait $$pid || { tail -n 20 .venv/pip.log; exit 1; }
	@touch $@

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis
