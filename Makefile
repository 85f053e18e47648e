# Two commands do all on a fresh machine with Python 3.11 or 3.12 and pip:
#   make demo   the whole method in minutes
#   make test   the tests
PYTHON ?= $(firstword $(foreach p,python3.12 python3.11 python3,$(if $(shell $(p) -c 'import sys; sys.exit(not (3,11) <= sys.version_info[:2] <= (3,12))' 2>/dev/null && echo yes),$(p))))
VENV := .venv
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-cluster test-docs test-slow audit clean

demo: $(INSTALLED)
	$(VENV)/bin/mmcot run --preset demo

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest -m "not slow and not gpu and not cluster and not docs"

# Two hosts in network namespaces, one lost and replaced; the same under Slurm's script. Needs root on Linux, else it skips and says why.
test-cluster: $(INSTALLED)
	$(VENV)/bin/python -m pytest -s -m cluster tests/cluster/test_cluster.py tests/cluster/test_slurm.py

# Every command of README.md, docs/ and deploy/ that needs no cluster, GPU, cloud or download, the demo among them.
test-docs: $(INSTALLED)
	$(VENV)/bin/python -m pytest -s -m docs tests/repo/test_docs.py

test-slow: $(INSTALLED)
	$(VENV)/bin/python -m pytest -m "slow"

# Known vulnerabilities of every package of the bill of materials; fails where one could not be asked about.
audit:
	$(PYTHON) -m venv build/audit
	build/audit/bin/python -m pip install --quiet pip-audit==2.10.1
	build/audit/bin/python -c "import json; print(*(c['name'] + '==' + c['version'] for c in json.load(open('deploy/sbom.cdx.json'))['components']), sep='\n')" > build/audit/requirements.txt
	build/audit/bin/pip-audit --strict --no-deps --disable-pip --requirement build/audit/requirements.txt

$(INSTALLED): pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed; found neither python3.12, python3.11 nor a fitting python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
