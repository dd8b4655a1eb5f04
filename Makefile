# Two commands do everything: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/build/torch_extensions
export MLFLOW_DISABLE_TELEMETRY ?= true
export DS_ACCELERATOR ?= cpu

.PHONY: quickstart test check lint types cluster ui lock clean

quickstart: $(VENV)/installed ## train everything small and write runs/quickstart/report.html
	$(BIN)/chainrule run configs/quickstart.yaml
	@$(PYTHON) -c "import pathlib, webbrowser; p = pathlib.Path('runs/quickstart/report.html').resolve(); print('open', p.as_uri()); webbrowser.open(p.as_uri())" 2>/dev/null || true

test: $(VENV)/installed ## every test but those that need a Slurm cluster
	$(BIN)/python -m pytest tests --ignore=tests/cluster -n 2 --dist worksteal

check: $(VENV)/installed lint types ## the fast subset, for daily work
	$(BIN)/python -m pytest tests --ignore=tests/cluster -m "not slow and not browser" -n 2 --dist worksteal

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed build/names
	MYPYPATH=build/names $(BIN)/mypy -p chainrule.pipeline -p chainrule.tokenizers -p chainrule.jobs

cluster: $(VENV)/installed ## a real Slurm on this machine (Debian: apt-get install slurm-wlm munge)
	$(BIN)/python -m pytest tests/cluster

ui: $(VENV)/installed ## MLflow's pages on runs/mlflow.db
	$(BIN)/chainrule ui

lock: ## the versions of a fresh environment with the ranges of pyproject.toml
	rm -rf build/lock && $(PYTHON) -m venv build/lock
	build/lock/bin/pip install -q torch==2.13.0
	build/lock/bin/pip install -q torch==2.13.0 -e ".[dev]"
	(sed -n '/^#/p' requirements.lock; build/lock/bin/pip freeze --exclude-editable | sed 's/+cpu//') > build/requirements.lock
	mv build/requirements.lock requirements.lock

# `tokenizers/` has no __init__.py and `chainrule` is a namespace: a type checker sees them
# through these links.
build/names:
	mkdir -p build/names/chainrule
	for room in pipeline tokenizers jobs configs; do ln -sfn ../../../$$room build/names/chainrule/$$room; done

$(VENV)/installed: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("chainrule needs Python 3.11 or later, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q torch==2.13.0
	$(BIN)/python -m pip install -q -r requirements.lock
	$(BIN)/python -m pip install -q --no-deps -e .
	touch $@

clean:
	rm -rf build .pytest_cache .ruff_cache .mypy_cache *.egg-info
