# The front door. Each target is one command; `make help` lists them.
MODEL   ?= fastvlm/demo_checkpoint
QUANT   ?= fp16
ARTEFACT ?= build/$(notdir $(patsubst %/,%,$(MODEL)))-$(QUANT)
APP     ?=
DEVICE  ?=
PYTHON  ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3,$(shell command -v $(p) 2>/dev/null)))
VENV    ?= .venv
RUN      = $(VENV)/bin/python -m
READY    = $(VENV)/.ready
EXTRA   ?=

.DEFAULT_GOAL := help
.PHONY: help setup export parity verify audit ranges recipes sweep app validate plan demo bench bench-export bench-encoder bench-quantization mac-report test lint clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  variables: MODEL=$(MODEL) QUANT=$(QUANT) ARTEFACT=$(ARTEFACT) APP=$(APP) DEVICE=$(DEVICE) EXTRA=\"more flags\""

setup: $(READY) ## Make the virtual environment (nothing to do when requirements.txt did not change)

$(READY): requirements.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(not (3, 11) <= v <= (3, 13))' || \
		{ echo "error: Python: got $$($(PYTHON) --version 2>&1), expected 3.11 to 3.13: make setup PYTHON=/path/to/python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $(READY)

export: $(READY) ## Checkpoint MODEL to a proven artefact at ARTEFACT, with QUANT (a recipe: make recipes)
	@$(RUN) model_export all --checkpoint "$(MODEL)" --output-dir "$(ARTEFACT)" --quant "$(QUANT)" --overwrite --parity-report "$(ARTEFACT)-parity.html" $(EXTRA)

parity: $(READY) ## Compare ARTEFACT with MODEL and write the report page
	@$(RUN) benchmarks parity --reference "$(MODEL)" --candidate "$(ARTEFACT)" $(EXTRA)

verify: $(READY) ## Check every file of ARTEFACT against its manifest
	@$(RUN) model_export verify --model "$(ARTEFACT)" $(EXTRA)

audit: $(READY) ## Check ARTEFACT's encoder against the rules for the Neural Engine
	@$(RUN) model_export audit "$(ARTEFACT)/fastvithd.mlpackage" $(EXTRA)

ranges: $(READY) ## How near MODEL's encoder comes to float16's end, operation by operation, with a plot
	@$(RUN) model_export ranges --checkpoint "$(MODEL)" --plot build/ranges.png $(EXTRA)

recipes: $(READY) ## List the recipes, their sizes and what loads them
	@$(RUN) quantization recipes $(EXTRA)

sweep: $(READY) ## Export and measure many recipes of MODEL; the page says which to ship
	@$(RUN) quantization sweep --checkpoint "$(MODEL)" $(EXTRA)

app: $(READY) ## Put ARTEFACT into the demo app at APP (ml-fastvlm/app), checked first
	@$(RUN) app_bridge bundle "$(ARTEFACT)" $(if $(APP),--app "$(APP)") $(EXTRA)

validate: $(READY) ## Check ARTEFACT against what the app will do with it (with APP: against its sources)
	@$(RUN) app_bridge validate "$(ARTEFACT)" $(if $(APP),--app "$(APP)") $(EXTRA)

plan: $(READY) ## Does ARTEFACT fit into the memory of DEVICE?
	@$(RUN) app_bridge plan "$(ARTEFACT)" $(if $(DEVICE),--device "$(DEVICE)") $(EXTRA)

demo: $(READY) ## Draw pictures, ask the demo checkpoint, show the answers
	@$(RUN) fastvlm demo $(EXTRA)

bench: $(READY) ## Time to first token of MODEL and of what was exported, side by side, with the page
	@$(RUN) benchmarks ttft --checkpoint "$(MODEL)" --output build/ttft.html --save build/ttft.json $(EXTRA)

bench-export: $(READY) ## Measure the export, the executor and the answers against their bars
	@$(RUN) benchmarks export $(EXTRA)

bench-encoder: $(READY) ## Measure range, graph, resolutions and compression of the encoder against their bars
	@$(RUN) benchmarks encoder $(EXTRA)

bench-quantization: $(READY) ## Measure conversion beside the peers, calibration and sweeps against their bars
	@$(RUN) benchmarks quantization $(EXTRA)

mac-report: $(READY) ## Verify on this Mac what only a Mac can, and write one page
	@$(RUN) benchmarks mac-report $(EXTRA)

lint: $(READY) ## Format, lint and type checks
	@$(VENV)/bin/ruff format --check --quiet .
	@$(VENV)/bin/ruff check --quiet .
	@$(RUN) mypy

test: lint ## Lint, then all tests (offline)
	@$(RUN) pytest $(EXTRA)

clean: ## Remove what the targets made, the virtual environment included
	rm -rf build $(VENV)
