# The front door. Each target is one command; `make help` lists them.
MODEL   ?= fastvlm/demo_checkpoint
ADAPTER ?=
QUANT   ?= fp16
FORMAT  ?= coreml
NAME    ?= $(if $(filter coreai,$(FORMAT)),coreai-)$(subst :,-,$(patsubst %.json,%,$(notdir $(QUANT))))
ARTEFACT ?= build/$(notdir $(patsubst %/,%,$(MODEL)))$(if $(ADAPTER),-$(notdir $(patsubst %/,%,$(ADAPTER))))-$(NAME)
FINETUNE = $(if $(ADAPTER),--adapter "$(ADAPTER)")
PAGE     = $(ARTEFACT)-parity.html
APP     ?=
DEVICE  ?=
PYTHON  ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3,$(shell command -v $(p) 2>/dev/null)))
VENV    ?= .venv
RUN      = $(VENV)/bin/python -m fastvlm
# Core AI's packages, where Apple publishes them: Linux on x86-64, macOS 26 (Darwin 25) on Apple silicon.
EXTRAS  ?= $(shell case "$$(uname -srm)" in (Linux*x86_64|Darwin\ 2[5-9]*arm64) echo coreai;; esac)
READY    = $(VENV)/.ready$(addprefix -,$(EXTRAS))
EXTRA   ?=
JOBS    ?= 2
comma    = ,

# $(call needs,VARIABLE,what it is,an example): end with one line where it was not given
needs    = test -n "$($(1))" || { echo "error: $(1): is missing, expected $(2): make $@ $(1)=$(3)" >&2; exit 2; }

.DEFAULT_GOAL := help
.PHONY: help setup export parity verify audit ranges recipes sweep app validate plan demo bench bench-export bench-encoder bench-quantization mac-report test test-fast lint clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  variables: MODEL=$(MODEL) ADAPTER=$(ADAPTER) QUANT=$(QUANT) FORMAT=$(FORMAT) ARTEFACT=$(ARTEFACT) APP=$(APP) DEVICE=$(DEVICE) EXTRA=\"more flags\""

setup: $(READY) ## Make the virtual environment (EXTRAS=coreai: Core AI's packages, too; EXTRAS= leaves them out)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(not (3, 11) <= v <= (3, 13))' || \
		{ echo "error: Python: got $$($(PYTHON) --version 2>&1), expected 3.11 to 3.13: make setup PYTHON=/path/to/python3.11" >&2; exit 2; }
	@echo "setting up $(VENV): about 90 s, 5 GB" >&2
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check --progress-bar on -c constraints.txt -e '.[cluster,app,finetune,heic,dev$(addprefix $(comma),$(EXTRAS))]' >&2
	@touch $(READY)

export: $(READY) ## Checkpoint MODEL (with ADAPTER) to a proven artefact at ARTEFACT, by QUANT (make recipes), or FORMAT=coreai
	@$(RUN) export "$(MODEL)" $(FINETUNE) --output-dir "$(ARTEFACT)" --quant "$(QUANT)" --format "$(FORMAT)" --overwrite --parity-report "$(PAGE)" $(EXTRA)

parity: $(READY) ## Compare ARTEFACT with MODEL and write the report page
	@$(RUN) parity --reference "$(MODEL)" $(FINETUNE) --candidate "$(ARTEFACT)" --output "$(PAGE)" $(EXTRA)

verify: $(READY) ## Check every file of ARTEFACT against its manifest
	@$(RUN) verify "$(ARTEFACT)" $(EXTRA)

audit: $(READY) ## Check ARTEFACT's encoder against the rules for the Neural Engine
	@$(RUN) audit "$(ARTEFACT)/fastvithd.mlpackage" $(EXTRA)

ranges: $(READY) ## How near MODEL's encoder comes to float16's end, operation by operation, with a plot
	@$(RUN) ranges --checkpoint "$(MODEL)" $(FINETUNE) --plot build/ranges.png $(EXTRA)

recipes: $(READY) ## List the recipes, their sizes and what loads them
	@$(RUN) recipes $(EXTRA)

sweep: $(READY) ## Export and measure many recipes of MODEL; the page says which to ship
	@$(RUN) sweep --checkpoint "$(MODEL)" $(FINETUNE) $(EXTRA)

app: $(READY) ## Put ARTEFACT into the demo app at APP (ml-fastvlm/app), checked first
	@$(call needs,APP,the folder app of a checkout of apple/ml-fastvlm,path/to/ml-fastvlm/app)
	@$(RUN) bundle "$(ARTEFACT)" --app "$(APP)" $(EXTRA)

validate: $(READY) ## Check ARTEFACT against what the app will do with it (with APP: against its sources)
	@$(RUN) validate "$(ARTEFACT)" $(if $(APP),--app "$(APP)") $(EXTRA)

plan: $(READY) ## Does ARTEFACT fit into the memory of DEVICE?
	@$(call needs,DEVICE,a device that \`fastvlm estimate --list\` names,iphone-15-pro)
	@$(RUN) plan "$(ARTEFACT)" --device "$(DEVICE)" $(EXTRA)

demo: $(READY) ## Draw pictures, ask the demo checkpoint, show the answers
	@$(RUN) demo $(EXTRA)

bench: $(READY) ## Time to first token of MODEL and of what was exported, side by side, with the page
	@$(RUN) ttft --checkpoint "$(MODEL)" $(FINETUNE) --output build/ttft.html --save build/ttft.json $(EXTRA)

bench-export: $(READY) ## Measure the export, the executor and the answers against their bars
	@$(RUN) bench-export $(EXTRA)

bench-encoder: $(READY) ## Measure range, graph, resolutions and compression of the encoder against their bars
	@$(RUN) bench-encoder $(EXTRA)

bench-quantization: $(READY) ## Measure conversion beside the peers, calibration and sweeps against their bars
	@$(RUN) bench-quantization $(EXTRA)

mac-report: $(READY) ## Verify on this Mac what only a Mac can, and write one page
	@$(RUN) mac-report $(EXTRA)

lint: $(READY) ## Checks of format, style, imports between modules, workflows and types
	@$(VENV)/bin/ruff format --check --quiet .
	@$(VENV)/bin/ruff check --quiet .
	@found=$$($(VENV)/bin/lint-imports --no-logo --no-cache) || { echo "$$found"; exit 1; }
	@$(VENV)/bin/zizmor --offline --quiet .github/workflows
	@$(VENV)/bin/mypy

test: lint ## Lint, then all tests (offline), JOBS at once
	@OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(JOBS) --dist worksteal $(EXTRA)

test-fast: $(READY) ## The tests that take no time: while you write
	@OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(JOBS) --dist worksteal -m "not slow" $(EXTRA)

clean: ## Remove what the targets made, the virtual environment included
	rm -rf build $(VENV)
