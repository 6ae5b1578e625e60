# One short target per action; CI calls the same ones. For another Python: `make test PYTHON=python3.13 VENV=.venv313`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PROTO_VENV := .venv-proto
SOURCES := setup.py pyproject.toml README.md $(wildcard grpc_batcher/*.p* grpc_batcher/*/*.p*)

# What depends neither on the transport nor on gRPC's poller, or chooses both for itself.
NOT_OVER_SOCKETS := $(wildcard tests/test_core*) $(patsubst %,tests/test_%.py,wire array array_codec leaks callback session \
	docs layout build_script uncompiled process interrupts tracing triton_client ray_replicas)
OVER_SOCKETS := $(filter-out $(NOT_OVER_SOCKETS),$(wildcard tests/test_*.py))

# How many tests run at once; most of them wait for something.
TEST_PROCESSES ?= 4
SOAK_S ?= 600
FUZZ_S ?= 300
DEBUG_TESTS ?= tests

.PHONY: demo demo-jax demo-ray test test-transports test-triton test-jax test-ray matrix bench bench-ray soak lint docs debug tsan asan fuzz wheels dist proto check-proto clean

demo: $(VENV)/installed-demo
	$(BIN)/python examples/atari_demo.py

demo-jax: $(VENV)/installed-demo-jax
	$(BIN)/python examples/jax_muzero.py

# In an environment of its own: Ray is large.
demo-ray:
	$(MAKE) $(VENV)-ray/installed-demo-ray VENV=$(VENV)-ray
	$(VENV)-ray/bin/python examples/ray_atari.py

test: $(VENV)/installed-test
	$(BIN)/pytest -n $(TEST_PROCESSES) tests

# The tests over sockets again. `make test` has both ends direct and tuned. With these four, server and client have run in
# all four pairings of transports, and each transport on each end both tuned and with gRPC's and glibc's own defaults.
# UNTUNED_TESTS="client security" chooses what runs with both ends direct and untuned, as in programs that import grpc
# first; MIXED_TESTS="client transports" chooses what runs with a different transport on each end.
AGAIN := $(BIN)/pytest -q -n $(TEST_PROCESSES)
UNTUNED := GRPC_BATCHER_TUNE_GRPC=0 GRPC_BATCHER_TUNE_MALLOC=0 $(AGAIN)
over_sockets = $(or $(patsubst %,tests/test_%.py,$(1)),$(OVER_SOCKETS))
test-transports: $(VENV)/installed-test
	GRPC_BATCHER_TRANSPORT=public $(AGAIN) $(OVER_SOCKETS)
	GRPC_BATCHER_TRANSPORT=direct $(UNTUNED) $(call over_sockets,$(UNTUNED_TESTS))
	GRPC_BATCHER_TRANSPORT=public/direct $(UNTUNED) $(call over_sockets,$(MIXED_TESTS))
	GRPC_BATCHER_TRANSPORT=direct/public $(UNTUNED) $(call over_sockets,$(MIXED_TESTS))

# tritonclient needs an older protobuf than the other tests.
test-triton:
	$(MAKE) $(VENV)-triton/installed-triton VENV=$(VENV)-triton
	$(VENV)-triton/bin/pytest -q tests/test_triton_client.py

# What is skipped without JAX.
test-jax: $(VENV)/installed-test $(VENV)/installed-demo-jax
	$(BIN)/pytest -q tests/test_examples.py tests/test_array_callback.py tests/test_docs.py -k "muzero or array"

# Replicas on a real Ray, and the page about them.
test-ray:
	$(MAKE) $(VENV)-ray/installed-test-ray VENV=$(VENV)-ray
	$(VENV)-ray/bin/pytest -q tests/test_ray_replicas.py tests/test_docs.py -k "ray_replicas or scaling or batcher_ray"

# The tests with the oldest and the newest releases, on each Python here. MATRIX_ROWS="3.10-oldest 3.13-newest" and
# MATRIX_TESTS="core wire" choose; `nox --list` names the rows. With GRPC_BATCHER_TRANSPORT, only the tests over sockets.
matrix: $(VENV)/installed-matrix
	$(BIN)/nox $(if $(MATRIX_ROWS),--error-on-missing-interpreters --sessions $(foreach row,$(MATRIX_ROWS),"tests($(row))")) \
		-- $(or $(MATRIX_TESTS:%=tests/test_%.py),$(if $(GRPC_BATCHER_TRANSPORT),$(OVER_SOCKETS)))

bench: $(VENV)/installed-bench
	$(BIN)/python benchmarks/run.py $(BENCH_OPTIONS)

bench-ray:
	$(MAKE) $(VENV)-ray/installed-bench-ray VENV=$(VENV)-ray
	$(VENV)-ray/bin/python benchmarks/replicas.py $(BENCH_OPTIONS)

# Mixed load for SOAK_S seconds, with an account of every request.
soak: $(VENV)/installed-test
	$(BIN)/python soak/run.py --seconds $(SOAK_S) $(SOAK_OPTIONS)

lint: $(VENV)/installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/shellcheck .ci/run scripts/*.sh
	$(BIN)/kubernetes-validate --strict docker/kubernetes.yaml
	PATH="$(abspath $(BIN)):$$PATH" cython-lint grpc_batcher
	PATH="$(abspath $(BIN)):$$PATH" actionlint $(wildcard .github/workflows/*.yml)
	$(BIN)/zizmor --offline --quiet .github
	$(BIN)/mypy
	$(BIN)/stubtest --mypy-config-file pyproject.toml grpc_batcher._arrays grpc_batcher._core grpc_batcher._wire

# The documentation's site in build/site. It needs Python 3.11 or newer.
docs: $(VENV)/installed-docs
	$(BIN)/python -I scripts/build_site.py

# The same tests on a core that checks its invariants.
debug: $(VENV)-debug/bin/python
	GRPC_BATCHER_DEBUG=1 $(VENV)-debug/bin/pip install --quiet ".[test]"
	$(VENV)-debug/bin/pytest -n $(TEST_PROCESSES) $(DEBUG_TESTS)

# The core's tests in a build with a sanitizer, and planted faults that it must find.
tsan: $(VENV)/installed-test
	$(BIN)/python scripts/sanitize.py thread

asan: $(VENV)/installed-test
	$(BIN)/python scripts/sanitize.py address

# Random messages for the readers, for FUZZ_S seconds.
fuzz: $(VENV)/installed-fuzz
	$(BIN)/python scripts/fuzz.py -max_len=400 -verbosity=0 -max_total_time=$(FUZZ_S)

wheels: $(VENV)/installed-dist
	$(BIN)/python scripts/build_wheels.py

# What is uploaded. The changelog must begin with the package's version, and for RELEASE=0.2.0 with that and a date.
dist: $(VENV)/installed-test
	$(BIN)/pytest -q tests/test_docs.py -k changelog
	@test -z "$(RELEASE)" || grep -qE '^## \[$(RELEASE)\] - [0-9]{4}-[0-9]{2}-[0-9]{2}$$' CHANGELOG.md || \
		{ echo "CHANGELOG.md has no section of $(RELEASE) with a date; see docs/releasing.md" >&2; exit 1; }
	$(MAKE) wheels
	$(BIN)/twine check --strict dist/*

proto: $(PROTO_VENV)/bin/python
	$(PROTO_VENV)/bin/python scripts/generate_proto.py

check-proto: $(PROTO_VENV)/bin/python
	$(PROTO_VENV)/bin/python scripts/generate_proto.py --check

clean:
	rm -rf $(VENV) $(VENV)-debug $(VENV)-triton $(VENV)-ray $(PROTO_VENV) build dist *.egg-info grpc_batcher/*.so
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PRECIOUS: %/bin/python
%/bin/python:
	$(PYTHON) -m venv $*

# Built once for all environments with the same Python: compiling takes longest. (From a folder, pip would build twice.)
WHEEL := build/wheel/$(notdir $(PYTHON))
$(WHEEL)/built: $(SOURCES) | $(VENV)/bin/python
	rm -rf $(WHEEL)
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir $(WHEEL) .
	touch $@

$(VENV)/installed-%: $(WHEEL)/built | $(VENV)/bin/python
	$(BIN)/pip install --quiet --force-reinstall --no-deps $(WHEEL)/*.whl
	$(BIN)/pip install --quiet "$$(echo $(WHEEL)/*.whl)[$*]"
	touch $@

# Only the tools: without a compiler, and without our package.
$(VENV)/installed-dist $(VENV)/installed-docs $(VENV)/installed-matrix: $(VENV)/installed-%: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install --quiet "pip>=25.1"
	$(BIN)/pip install --quiet --group $*
	touch $@

# The generator's version decides the oldest protobuf that loads its output (see the dependencies in pyproject.toml).
$(PROTO_VENV)/bin/python:
	$(PYTHON) -m venv $(PROTO_VENV)
	$(PROTO_VENV)/bin/pip install --quiet "grpcio-tools==1.62.3" "setuptools<80"
