# Two commands do everything on a fresh machine:
#   make serve        environment, weights, and the default fleet on http://127.0.0.1:8420 (PORT= changes it)
#   make test         every test, on real models
PORT    ?= 8420
FLEET   ?= fleet
DATA    ?= $(CALM_DATA)
TRUTH   := domains:pubmedqa,headlines_finance,commonsenseqa
VENV    := .venv
BIN     := $(VENV)/bin
LOCKUV  := $(BIN)/uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header

.DEFAULT_GOAL := help
.PHONY: help serve test check format lock weights reference clean train-env adapters \
        bench-gateway bench-decision bench-threads bench-soak bench-fresh bench-paper bench-scaling bench-truth \
        bench-headline bench-quantisation bench-specialists bench-switching bench-training

help: ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/.base: requirements/base.lock pyproject.toml scripts/install.sh
	@scripts/install.sh $(VENV) requirements/base.lock $@

$(VENV)/.dev: requirements/dev.lock pyproject.toml scripts/install.sh
	@scripts/install.sh $(VENV) requirements/dev.lock $@
	@touch $(VENV)/.base

serve: $(VENV)/.base ## install, fetch the default fleet, serve it
	@exec $(BIN)/calm serve --fleet $(FLEET) --port $(PORT)

weights: $(VENV)/.base ## fetch the default fleet's weights (and the test assets) into the cache
	@$(BIN)/calm models pull --fleet $(FLEET) --assets

check: $(VENV)/.dev ## format, lint, types, import contracts, fast tests
	@$(BIN)/ruff format --check -q . && $(BIN)/ruff check -q . && echo "format and lint: ok"
	@$(BIN)/mypy
	@$(BIN)/lint-imports | tail -n 4
	@$(BIN)/pytest tests/unit tests/contract -m "not models"

test: $(VENV)/.dev weights ## everything: static checks, then all tests on real models
	@$(BIN)/ruff format --check -q . && $(BIN)/ruff check -q . && echo "format and lint: ok"
	@$(BIN)/mypy
	@$(BIN)/lint-imports | tail -n 4
	@$(BIN)/pytest tests

train-env: $(VENV)/.dev ## add PyTorch, which calm specialise and its tests need
	@$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install -q --disable-pip-version-check torch==2.13.0

adapters: train-env weights ## train every shipped specialist again (DATA=DIR; some hours on two cores)
	@$(BIN)/python training/make.py --data "$(DATA)" --again

format: $(VENV)/.dev ## rewrite the code in the house format
	@$(BIN)/ruff format -q . && $(BIN)/ruff check -q --fix .

reference: $(VENV)/.dev ## regenerate the published JSON Schema and the reference pages
	@$(BIN)/python scripts/settings_reference.py
	@$(BIN)/python scripts/cli_reference.py
	@$(BIN)/python -m calm.registry > docs/schema/model-card.schema.json

lock: $(VENV)/.dev ## resolve dependencies anew into requirements/*.lock
	@$(BIN)/pip install -q uv
	@$(LOCKUV) pyproject.toml requirements/build.in -o requirements/base.lock
	@$(LOCKUV) --extra test --extra check --extra bench pyproject.toml requirements/build.in -o requirements/dev.lock

bench-gateway: $(VENV)/.dev ## gateway overhead beside LiteLLM's proxy
	@$(BIN)/python benchmarks/gateway.py
bench-decision: $(VENV)/.dev ## time of a decision, embedding included
	@$(BIN)/python benchmarks/decision.py
bench-threads: $(VENV)/.dev weights ## our thread budget against oversubscription
	@$(BIN)/python benchmarks/threads.py
bench-soak: $(VENV)/.dev weights ## 1,000 streamed requests with disconnects and a killed engine
	@$(BIN)/python benchmarks/soak.py
bench-paper: $(VENV)/.dev ## the paper reproduced, and ours against it, in replay (DATA=DIR)
	@$(BIN)/python -m benchmarks.paper.reproduce --data "$(DATA)" --seeds 5 --out results
	@$(BIN)/python -m benchmarks.paper.ours --data "$(DATA)" --out results
	@$(BIN)/python -m benchmarks.paper.ours --data "$(DATA)" --floor 0.712 --out results
bench-scaling: $(VENV)/.dev ## decisions and ticks from 10 to 1,000 models, in replay
	@$(BIN)/python -m benchmarks.scaling
bench-truth: $(VENV)/.dev weights ## the simulator beside the real engine at three loads (DATA=DIR; about an hour)
	@$(BIN)/calm profile --again --repeats 2 --data "$(DATA)" --queries $(TRUTH) --sample 40 --max-tokens 64 \
	   --out results/profile.toml --answers results/answers.jsonl
	@$(BIN)/python -m benchmarks.simulator_truth --profile results/profile.toml --answers results/answers.jsonl \
	   --data "$(DATA)"
HALF = 900MB
bench-headline: $(VENV)/.dev weights ## the fleet of specialists against its largest model, three loads (DATA=DIR; an hour)
	@$(BIN)/calm models pull --assets --fleet fleet
	@$(BIN)/python -m benchmarks.headline --data "$(DATA)" --budget $(HALF)
bench-quantisation: $(VENV)/.dev weights ## which quantisation of a base is fastest at equal quality (DATA=DIR)
	@$(BIN)/python -m benchmarks.quantisation --data "$(DATA)"
bench-specialists: $(VENV)/.dev weights ## specialists, bases and TinyLlama on held-out rows (DATA=DIR, LIMIT=rows; hours)
	@$(BIN)/python -m benchmarks.specialists --data "$(DATA)" $(if $(LIMIT),--limit $(LIMIT))
bench-switching: $(VENV)/.dev weights ## many specialists on one base: memory, switching, loading
	@$(BIN)/python -m benchmarks.switching
bench-training: train-env weights ## tokens a second that calm specialise learns (beside peft where installed)
	@$(BIN)/python -m benchmarks.training
bench-fresh: ## fresh clone, empty cache: time to the first answer, and of make test
	@benchmarks/fresh.sh

clean: ## remove the environment and caches inside the tree
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
