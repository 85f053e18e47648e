# Two commands do all on a fresh machine with Python 3.11 or 3.12 and pip:
#   make demo   the whole method in minutes
#   make test   the tests
PYTHON ?= $(firstword $(foreach p,python3.12 python3.11 python3,$(if $(shell $(p) -c 'import sys; sys.exit(not (3,11) <= sys.version_info[:2] <= (3,12))' 2>/dev/null && echo yes),$(p))))
VENV := .venv
INSTALLED := $(VENV)/.installed
# What `make test` leaves out: long and slow proofs, and what needs a GPU, several hosts or the commands of the pages.
USUAL := not long and not slow and not gpu and not fake_gpu and not cluster and not docs

.DEFAULT_GOAL := help
.PHONY: help demo check format test test-long test-cluster test-docs test-fake-gpu test-gpu test-slow coverage bench hooks audit clean

help:  ## Show these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(INSTALLED)  ## Run the whole method on a small data set, in minutes
	$(VENV)/bin/mmcot run --preset demo

check: $(INSTALLED)  ## Format, lint, types, import law and the quick tests without Ray: under 2 minutes
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python
	$(VENV)/bin/python -m pytest -q -n 2 --dist loadfile -m "$(USUAL) and not ray and not processes"

format: $(INSTALLED)  ## Format the code and mend what ruff can mend
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

test: $(INSTALLED)  ## All usual tests, with the ten slowest
	$(VENV)/bin/python -m pytest -m "$(USUAL)"

test-long: $(INSTALLED)  ## Kills, closed terminals and tunings of real runs: proofs of half a minute or more
	$(VENV)/bin/python -m pytest -m long

# One host is lost and replaced; the same under Slurm's script. Needs root on Linux, else it skips and gives the reason.
test-cluster: $(INSTALLED)  ## The demo on two hosts in network namespaces
	$(VENV)/bin/python -m pytest -s -m cluster tests/cluster/test_cluster.py tests/cluster/test_slurm.py

test-docs: $(INSTALLED)  ## Every command of the pages that needs no cluster, GPU, cloud or download
	$(VENV)/bin/python -m pytest -s -m docs tests/repo/test_docs.py

test-fake-gpu: $(INSTALLED)  ## Launches, waits and memory on a stand-in for CUDA, where its build exists
	$(VENV)/bin/python -m pytest -m fake_gpu

test-gpu: $(INSTALLED)  ## The parts of the proof on this machine's GPU, at a tiny size
	$(VENV)/bin/python -m pytest -m gpu tests/gpu

test-slow: $(INSTALLED)  ## Proofs of minutes
	$(VENV)/bin/python -m pytest -m "slow"

coverage: $(INSTALLED)  ## Line coverage of the usual tests, with the processes that they start
	$(VENV)/bin/python -m coverage erase
	$(VENV)/bin/python -m coverage run -m pytest -q -m "$(USUAL)"
	$(VENV)/bin/python -m coverage combine -q
	$(VENV)/bin/python -m coverage report --skip-covered --sort=cover

# On ScienceQA where MMCOT_SCIENCEQA_DIR names it, else on generated texts; a commit of the results makes the page true.
bench: $(INSTALLED)  ## Speed beside other programs, in less than an hour, into benchmarks/results and docs/performance.md
	OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/training.py --steps 2 --out benchmarks/results
	OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/training.py --ranks 2 --stages 0 1 --steps 2 --out benchmarks/results
	OMP_NUM_THREADS=2 $(VENV)/bin/python benchmarks/checkpoints.py --out benchmarks/results
	OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/generation.py --questions 128 --rounds 3 --out benchmarks/results
	OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/stream.py --rounds 5 --many 16384 --out benchmarks/results
	OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/features.py --rounds 2 --pictures 96 --out benchmarks/results
	$(VENV)/bin/python benchmarks/performance_page.py

hooks: $(INSTALLED)  ## Install the hooks that check a commit
	$(VENV)/bin/pre-commit install

audit:  ## Known vulnerabilities of every package of the bill of materials; fails where one could not be asked about
	$(PYTHON) -m venv build/audit
	build/audit/bin/python -m pip install --quiet pip-audit==2.10.1
	build/audit/bin/python -c "import json; print(*(c['name'] + '==' + c['version'] for c in json.load(open('deploy/sbom.cdx.json'))['components']), sep='\n')" > build/audit/requirements.txt
	build/audit/bin/pip-audit --strict --no-deps --disable-pip --requirement build/audit/requirements.txt

$(INSTALLED): pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed; found neither python3.12, python3.11 nor a fitting python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "installing pinned packages into $(VENV): some GB and minutes, once"
	@$(VENV)/bin/python -m pip install --quiet --editable ".[test,dev]" & pid=$$!; seconds=0; \
	while kill -0 $$pid 2>/dev/null; do \
	  sleep 1; seconds=$$((seconds + 1)); \
	  if [ $$((seconds % 4)) = 0 ]; then echo "  installing, $$seconds s"; fi; \
	done; wait $$pid
	touch $@

clean:  ## Remove the environment and what was built
	rm -rf $(VENV) build dist *.egg-info
