# Two commands on a machine with Python, make and git: `make demo` and `make test`. `make help` lists the rest.

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed

# Another environment may be active in the caller's shell; nothing here may look into it or install into it.
unexport VIRTUAL_ENV CONDA_PREFIX CONDA_DEFAULT_ENV PYTHONPATH PYTHONHOME
unexport PIP_USER PIP_TARGET PIP_PREFIX UV_SYSTEM_PYTHON UV_PYTHON UV_PROJECT_ENVIRONMENT

# The interpreter that .venv is made with: make install PYTHON=/path/to/python
PYTHON     ?=
CANDIDATES := $(or $(PYTHON),python3.13 python3.12 python3.11 python3)
IN_RANGE   := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))

.DEFAULT_GOAL := help
.PHONY: help install test lint long fuzz audit docs demo bench browser parity zoo constraints clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1	\2/p' Makefile | expand -t 20

install: $(STAMP)  ## make .venv and install steerfm into it (about 6 GB)

$(STAMP): pyproject.toml constraints.txt
	@if ! $(BIN)/python -c '$(IN_RANGE)' >/dev/null 2>&1; then \
	  python=; for candidate in $(CANDIDATES); do \
	    if "$$candidate" -c '$(IN_RANGE)' >/dev/null 2>&1; then python="$$candidate"; break; fi; \
	  done; \
	  if [ -z "$$python" ]; then \
	    echo "steerfm needs Python 3.11 to 3.14 and found none among: $(CANDIDATES). Fix: make install PYTHON=/path/to/python3.11" >&2; exit 1; \
	  fi; \
	  if ! "$$python" -c 'import venv, ensurepip' >/dev/null 2>&1; then \
	    echo "$$python has no venv module. Fix: sudo apt install $$("$$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')-venv, or make install PYTHON=/path/to/another/python" >&2; exit 1; \
	  fi; \
	  echo "making $(VENV) with $$("$$python" --version)"; \
	  "$$python" -m venv --clear $(VENV) || exit 1; \
	fi
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip --upgrade
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv -c constraints.txt
	$(BIN)/uv pip install --python $(BIN)/python -e '.[dev]' -c constraints.txt
	@touch $@

demo: $(STAMP)  ## run the main job: steer and fine-tune a trained text-to-image map, compare (minutes, no GPU)
	$(BIN)/steerfm demo

WORKERS := 2

test: lint  ## lint, then all tests that need neither a GPU nor a browser, in two processes (WORKERS=)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

long: $(STAMP) fuzz  ## what `make test` leaves out: fuzzing at length, then the slow tests (hours)
	$(BIN)/python -m pytest -m slow

INPUTS := 10000

fuzz: $(STAMP)  ## damaged recipes, prompt files, checkpoints, requests and run folders, 10,000 of each (an hour; INPUTS=)
	STEERFM_FUZZ=$(INPUTS) $(BIN)/python -m pytest tests/fuzz --durations=0

# --strict: a release that the service does not know is an error, and no clean bill.
audit: $(STAMP)  ## known vulnerabilities of the versions in constraints.txt (asks the Python package index)
	@$(BIN)/uv tool run --quiet --with pip pip-audit@2.10.1 --strict --disable-pip --no-deps -r constraints.txt \
	  || { echo "Either a release above has a known fault, or the Python package index did not say. Fix: raise its least version in pyproject.toml and make constraints; or ask from a machine that reaches the index itself, not a mirror" >&2; exit 1; }

lint: $(STAMP)  ## formatting, style, types, and who may import whom
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright
	$(BIN)/python -m pytest -q tests/unit/test_import_table.py

docs: $(STAMP)  ## build the guide and the API reference into build/docs, and run the notebooks (minutes)
	$(BIN)/sphinx-build -W --keep-going -q -c docs -d build/doctrees . build/docs
	@echo "open build/docs/index.html"

bench: $(STAMP)  ## speed and quality, one table a script (hours; each can be run alone)
	@for script in benchmarks/*.py; do \
	  case "$$script" in \
	    */landscape.py|*/steering_exact.py|*/steering_learnt.py|*/finetuning_exact.py) mode=--fast ;; \
	    */steering_cost.py) mode="digits --fast" ;; \
	    */against_alignprop.py) echo "== $$script is run alone: it makes an environment of 6 GB"; continue ;; \
	    */finetuning_learnt.py) mode="digits --seconds 20" ;; \
	    */rehearsal.py) mode="run --in build/rehearsal" ;; \
	    */scaling.py) mode=throughput ;; \
	    *) mode= ;; \
	  esac; \
	  echo "== $$script $$mode"; $(BIN)/python "$$script" $$mode || exit 1; \
	done

AXE := build/axe/package/axe.min.js

browser: $(STAMP) $(AXE)  ## the comparison page in a real Chromium (Debian's, installed here if need be), pictures in build/screenshots
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || { \
	  sudo=; [ "$$(id -u)" = 0 ] || sudo="sudo -n"; \
	  $$sudo apt-get update -q && $$sudo apt-get install -y -q chromium chromium-driver; \
	} || echo "Chromium could not be installed, so these tests are skipped. Fix: sudo apt-get install chromium chromium-driver" >&2
	$(BIN)/python -m pytest -m browser -rs

$(AXE):  # what finds faults of accessibility; MPL-2.0, fetched for the test and not shipped
	@mkdir -p build/axe && cd build/axe && npm pack --silent axe-core@4 >/dev/null && tar xzf axe-core-*.tgz package/axe.min.js \
	  || echo "axe-core could not be fetched, so its test is skipped. Fix: install npm" >&2

PARITY := .venv-image-reward

parity: $(STAMP)  ## ImageReward against the original package, which needs an environment of its own (5 GB)
	$(BIN)/uv venv --quiet --allow-existing --python 3.11 $(PARITY)
	$(BIN)/uv pip install --python $(PARITY)/bin/python -r benchmarks/parity/image_reward/requirements.txt
	$(BIN)/python benchmarks/parity/image_reward/compare.py --python $(PARITY)/bin/python

# Waiting threads spin: 1.4 times faster where nothing else runs, and several times slower beside other work.
zoo: export GOMP_SPINCOUNT = 100000
zoo: $(STAMP)  ## train, measure and replace the models that ship with the package (two hours)
	$(BIN)/steerfm train recipe=shapes_clip name=zoo_clip
	$(BIN)/steerfm train recipe=shapes name=zoo_map
	$(BIN)/python benchmarks/shapes.py --map runs/zoo_map --clip runs/zoo_clip --ship

constraints: $(STAMP)  ## write constraints.txt from what is installed in .venv
	@{ sed -n '/^#/p' constraints.txt; \
	   $(BIN)/uv pip freeze --python $(BIN)/python --exclude-editable | grep -vE '^pip==|@'; } > $(VENV)/constraints.txt
	@mv $(VENV)/constraints.txt constraints.txt

clean:  ## remove what building and testing left behind; keeps .venv and runs/
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .coverage htmlcov
	find steerfm rewards recipes tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
