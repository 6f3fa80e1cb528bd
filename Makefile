# Every target first sets up what it needs in .venv, once, from PyPI; again only when pyproject.toml changes.
# Another Python than `python3`: make run PYTHON=python3.12

PYTHON = python3
BIN = .venv/bin
INSTALLED = .venv/.installed

.PHONY: help install run test lab lint figures

help:
	@echo "make install only set up .venv, as every other target does first"
	@echo "make run    execute the notebooks (quick profile) into runs/ and print the table of results"
	@echo "make test   lint, unit tests and every notebook"
	@echo "make lab    open the notebooks in JupyterLab"
	@echo "make figures rewrite the pictures of README.md"
	@echo "make lint   check style and format, notebooks included"

install: $(INSTALLED)

run: $(INSTALLED)
	$(BIN)/effad run

# Processes of one thread each share the cores. One of them takes the notebooks, first, as they take longest.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest notebooks tests -n auto --maxprocesses 4 --dist loadfile \
		--no-loadscope-reorder --nbval-lax --nbval-current-env --nbval-cell-timeout=900

# A picture that is uploaded comes in one message.
lab: $(INSTALLED)
	$(BIN)/jupyter lab notebooks --ServerApp.tornado_settings='{"websocket_max_message_size": 268435456}'

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# A .venv that works is kept; one that is broken (moved, or its Python gone) is made anew. Bytecode is compiled once, as
# pip would: else every kernel compiles torch anew where PYTHONDONTWRITEBYTECODE is set, as in many containers.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "effad needs Python 3.11 or newer; '$(PYTHON)' is not. Name one: make run PYTHON=python3.12" >&2; exit 1; }
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || $(PYTHON) -m venv --clear .venv
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/python -m uv pip install --quiet --compile-bytecode --python $(BIN)/python \
		-e ".[data,notebooks,export,cluster,test]"
	@touch $(INSTALLED)

# A quarter of an hour of a machine without other work.
LATENCY = {run_folder: runs/quick/synthetic, sizes: [XS, S, M], image_size: [256, 256], batches: [1, 16], threads: 0, \
	longest: 5, seconds: 12}

# The pictures of README.md, from the runs of `make run`.
figures: run
	cp runs/quick/synthetic/figures/typical.png figures/heatmaps.png
	cp runs/quick/elpv_mono/figures/scores.png figures/scores.png
	cp runs/quick/data/figures/products.png figures/products.png
	$(BIN)/papermill notebooks/07_export_and_latency.ipynb runs/latency.ipynb --cwd notebooks -y "$(LATENCY)"
	cp runs/quick/synthetic/figures/latency.png figures/latency.png
	cp runs/quick/synthetic/figures/latency.csv data/benchmarks/latency.csv
	EFFAD_RUN=runs/quick/synthetic EFFAD_SCREENSHOT=figures/viewer.png $(BIN)/python -m pytest -q tests/test_browser.py
