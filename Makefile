# The two commands of a fresh machine: `make quickstart` and `make test`. Both install into .venv first; all they need is Python 3.11+.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test lint clean

quickstart: .venv/installed
	$(BIN)/python data/python_stdlib/prepare.py
	$(BIN)/python train.py config/quickstart.py
	$(BIN)/python visualize_training.py out-quickstart
	$(BIN)/python sample.py --out_dir=out-quickstart --start="def " --num_samples=3 --max_new_tokens=120
	@echo "Its picture and log are in out-quickstart/. Next: source .venv/bin/activate; python train.py --help; scripts/start_tensorboard.sh"

test: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto $(ARGS)

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("nanotrain needs Python 3.11 or newer, not " + sys.version.split()[0] + "; try: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

clean:  # what was installed, and caches; runs and datasets stay
	rm -rf .venv .pytest_cache .ruff_cache __pycache__ */__pycache__ data/*/__pycache__
