# Every target sets up what it needs, once, in .venv.
# VENV=none PYTHON=python3 uses that Python as it is (its torch, its CUDA) and installs nothing.
PYTHON ?= python3
VENV ?= .venv
PORT ?= 8888

ifeq ($(VENV),none)
PY := $(PYTHON)
READY :=
NEED = @$(PY) tools/need.py
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
else
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
NEED = @:
endif

# Importing PyTorch from source alone costs every kernel seconds: where nothing may lie beside the sources, compiled modules lie in .cache.
ifdef PYTHONDONTWRITEBYTECODE
unexport PYTHONDONTWRITEBYTECODE
export PYTHONPYCACHEPREFIX := $(CURDIR)/.cache/modules
endif

BIN = $(shell $(PY) -c 'import sysconfig; print(sysconfig.get_path("scripts"))')

.DEFAULT_GOAL := help
.PHONY: help run lab app test test-ui docs export hooks clean

help:
	@echo 'make run      the first experiment: how much of the embedded model is needed? (ends with a report in runs/)'
	@echo 'make lab      JupyterLab on the workbench notebook'
	@echo 'make app      the same dashboards as a web page, without code (Voilà)'
	@echo 'make test     notebooks in step, ruff, mypy, every notebook, every test, also in a real browser'
	@echo 'make test-ui  of these, the dashboards in JupyterLab and Voilà alone (wants a quiet machine)'
	@echo 'make docs     the documentation site, in _docs/'
	@echo 'make export   modules, README.md and clean notebooks from the notebooks'
	@echo 'make hooks    git merges notebooks cell by cell, Jupyter saves them clean'
	@echo 'make clean    removes what was generated, keeps runs/ and .venv/'

$(VENV)/.ready: requirements.txt constraints.txt setup.py settings.ini tools/setup.sh
	@rm -f $@
	@echo 'setup: puts the versions of requirements.txt into $(VENV), once (a minute or two, 3 GB), so that every machine runs the same'
	@sh tools/setup.sh $(PYTHON) $(VENV)
	@touch $@

run: $(READY)
	$(NEED) run
	@echo 'run: prunes the embedded model step by step to see how much of it is needed (experiment essential_sparsity)'
	@$(PY) -c 'import sys; from sparse_workbench.cli import main; sys.exit(main())' run essential_sparsity $(ARGS)

lab: $(READY)
	$(NEED) lab
	@echo 'lab: opens nbs/workbench.ipynb in JupyterLab to look at masks, curves and gradients by hand (stop: Ctrl-C twice)'
	@$(PY) -m jupyterlab --config=tools/jupyter_lab_config.py --port=$(PORT) nbs/workbench.ipynb $(ARGS)

app: $(READY)
	$(NEED) lab
	@echo 'app: serves the dashboards of nbs/workbench.ipynb as a page without code, at http://localhost:$(PORT) (stop: Ctrl-C)'
	@PATH="$(BIN):$$PATH" $(PY) -m voila nbs/workbench.ipynb --no-browser --port=$(PORT) --strip_sources=True --show_tracebacks=True $(ARGS)

test: $(READY)
	$(NEED) test
	@echo 'test: notebooks in step with modules, ruff, mypy, then every notebook and test, in parallel (the last line counts them)'
	@$(PY) tools/sync.py check
	@$(PY) -m ruff check -q $(wildcard tests tools benchmarks)
	@$(PY) -m mypy sparse_workbench
	@$(PY) -m pytest -q -n auto --maxprocesses 8 --dist loadgroup --ignore=tests/ui $(ARGS)
ifndef ARGS
	@$(MAKE) --no-print-directory test-ui
endif

test-ui: $(READY)
	$(NEED) test
	@sh tools/browser.sh
	@echo 'test-ui: drives the dashboards in Chromium, one page after the other, since what is timed there needs a quiet machine'
ifdef ARGS
	@$(PY) -m pytest -q -p no:xdist tests/ui $(ARGS)
else
	@for f in $(wildcard tests/ui/test_*.py); do \
	    $(PY) -m pytest -q -p no:xdist $$f && continue; \
	    echo "test-ui: $$f once more, since a busy machine can upset a browser; what fails twice has failed"; \
	    $(PY) -m pytest -q -p no:xdist $$f || exit; \
	done
endif

docs: $(READY)
	$(NEED) docs
	@echo 'docs: turns the notebooks with their stored outputs into pages, so that method, picture and number stand together'
	@$(PY) tools/nb2md.py
	@$(PY) -m zensical build --clean --strict -f _site.yml
	@echo 'open _docs/index.html'

export: $(READY)
	$(NEED) export
	@echo 'export: writes modules, README.md and clean notebooks from the notebooks, their one source'
	@$(PY) tools/sync.py write

hooks: $(READY)
	$(NEED) export
	@echo 'hooks: git merges notebooks cell by cell, Jupyter saves them clean (writes .gitconfig, .git/hooks and ~/.jupyter)'
	@$(PY) -c 'from nbdev.clean import nbdev_install_hooks; nbdev_install_hooks()'
	@sed -i.bak 's#nbdev_\(merge\|trust\)#$(BIN)/&#' .gitconfig "$$(git rev-parse --git-path hooks)/post-merge"
	@rm -f .gitconfig.bak "$$(git rev-parse --git-path hooks)/post-merge.bak"

clean:
	@echo 'clean: removes generated pages, caches and build files; keeps runs/ (results) and .venv/ (installed packages)'
	@rm -rf _docs _docs_src _site.yml _proc .cache build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -path ./.venv -prune -o -path ./runs -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -prune -exec rm -rf {} +
