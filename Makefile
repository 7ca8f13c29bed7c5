# Every target sets up what it needs in .venv: Python, make and git are enough on a fresh machine.
#   make test PYTHON=python3.13   makes .venv anew with that interpreter
#   make test TORCH=2.11.0        installs that torch in place of the one constraints.txt pins
# Without TORCH= the next run goes back to the pin. CONTRIBUTING.md has the plain `python -m` commands.

PYTHON ?= python3
TORCH ?=
# Processes that run tests side by side, each with one torch thread.
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
RUN := $(BIN)/python
BENCH := .venv-bench
BENCH_RUN := $(BENCH)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)/python

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Two pip runs at once would break the environment.
.NOTPARALLEL:
.PHONY: help setup test test-statistics mutants chaos demo examples examples-quick bench bench-statistics bench-quick bench-peers bench-regression notebooks lint format types ci docs docs-test docs-links build clean FORCE

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-16s %s\n", $$1, $$2 }' Makefile

setup: $(VENV)/.stamp-tests $(VENV)/.stamp-lint $(VENV)/.stamp-examples  ## make .venv with everything for development

test: $(VENV)/.stamp-tests $(VENV)/.stamp-examples  ## run the tests and the doctests
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(WORKERS)

test-statistics: $(VENV)/.stamp-tests  ## run the statistical tests on fresh seeds
	$(RUN) -m pytest -m statistics --fresh-seeds -s tests

mutants: $(VENV)/.stamp-tests  ## plant bugs one by one and check that the tests find each
	$(RUN) tests/mutants.py

chaos: $(VENV)/.stamp-tests  ## try to break it: faults, kills, damaged files, strange inputs (20 minutes)
	cd chaos && status=0; for script in [a-z]*.py; do OMP_NUM_THREADS=1 ../$(RUN) $$script || status=1; done; \
		../$(RUN) _table.py && exit $$status

demo: $(VENV)/.stamp-examples  ## run the quickstart example
	$(RUN) examples/quickstart.py

# Those with a table, from which reproductions.py makes the page; the quickstart has a target of its own.
EXAMPLES := $(filter-out quickstart check reproductions simulator,$(basename $(notdir $(wildcard examples/*.py))))

examples: $(VENV)/.stamp-examples  ## run all examples in full and make docs/reproductions.md (half an hour)
	@for name in $(EXAMPLES); do \
		OMP_NUM_THREADS=1 $(RUN) examples/$$name.py --output docs/images/$$name.png || exit 1; done
	$(RUN) examples/check.py --figure docs/images/check.png
	rm -rf build/simulator
	OMP_NUM_THREADS=1 $(RUN) examples/simulator.py --folder build/simulator
	$(RUN) examples/reproductions.py

examples-quick: $(VENV)/.stamp-examples  ## run a smoke of each example (a minute)
	@mkdir -p build/examples; for name in $(EXAMPLES); do \
		OMP_NUM_THREADS=1 $(RUN) examples/$$name.py --quick --output build/examples/$$name.png || exit 1; done
	rm -rf build/simulator
	OMP_NUM_THREADS=1 $(RUN) examples/simulator.py --folder build/simulator --steps 2

notebooks: $(VENV)/.stamp-docs  ## run the tutorial notebooks and write their outputs down (2 minutes)
	$(RUN) .ci/notebooks.py

bench: $(BENCH)/.stamp  ## compare speed and memory with other packages, in an environment of its own (10 minutes)
	cd benchmarks && ../$(BENCH_RUN) compare.py && ../$(BENCH_RUN) memory.py && ../$(BENCH_RUN) fixed_cost.py && ../$(BENCH_RUN) page.py && ../$(BENCH_RUN) front_page.py

bench-statistics: $(BENCH)/.stamp  ## count the evaluations that each direction family needs, beside other packages (30 minutes)
	cd benchmarks && ../$(BENCH_RUN) evaluations.py

bench-quick: $(BENCH)/.stamp  ## compare speed on the smaller workloads (2 minutes)
	cd benchmarks && ../$(BENCH_RUN) compare.py --quick

bench-peers: $(BENCH)/.stamp  ## verify each point of the comparison with other packages (2 minutes)
	cd benchmarks/peers && OMP_NUM_THREADS=1 ../../$(BENCH_RUN) table.py

# ONLY="large one" runs the rows whose names begin with one of these; ROUNDS=60 lets noisy rows go on for longer.
BASE ?=
ONLY ?=
ROUNDS ?=
bench-regression: $(VENV)/.stamp-tests  ## compare speed and memory with an older commit: BASE=<commit> (up to 2 hours, on an idle machine)
	@test -n "$(BASE)" || { echo "make bench-regression BASE=<commit>: the commit to compare with"; exit 2; }
	OMP_NUM_THREADS=1 $(RUN) benchmarks/regression.py --base $(BASE) $(if $(ONLY),--only $(ONLY)) $(if $(ROUNDS),--most-rounds $(ROUNDS))

lint: $(VENV)/.stamp-lint  ## check the format and the style
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .

format: $(VENV)/.stamp-lint  ## format the code and apply the safe fixes
	$(RUN) -m ruff check --fix-only .
	$(RUN) -m ruff format .

# pyright --verifytypes looks for the package in the first python on PATH, whatever --pythonpath says.
types: $(VENV)/.stamp-lint  ## check the types, and that every public name has one
	$(RUN) -m mypy --strict src
	PATH="$(CURDIR)/$(BIN):$$PATH" python -m pyright --verifytypes zograd --ignoreexternal

ci: lint types test  ## run what CI runs

SITE := docs/_build/html

docs: $(VENV)/.stamp-tests $(VENV)/.stamp-docs  ## run the code of every page and docstring, and build the site (3 minutes)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(WORKERS) tests/test_docs.py src
	$(RUN) -m sphinx -W --keep-going -E -q -b html docs $(SITE)
	@echo "open $(SITE)/index.html"

docs-test: docs  ## open every built page in headless Chromium, at two widths, light and dark (2 minutes)
	$(RUN) tests/browse.py $(SITE) --screenshots docs/_build/screenshots

docs-links: $(VENV)/.stamp-docs  ## ask whether the sites that the pages link to still answer
	$(RUN) -m sphinx -W --keep-going -q -b linkcheck docs docs/_build/links

build: $(VENV)/.stamp-build  ## build the source distribution and the wheel, and try each in an environment of its own
	rm -rf dist
	$(RUN) -m build
	$(RUN) .ci/smoke.py dist

clean:  ## remove .venv and everything that was built
	rm -rf $(VENV) $(BENCH) build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -type d -name __pycache__ -prune -exec rm -rf {} +

# A stamp .stamp-<extra> says that the extra of pyproject.toml is installed.
$(VENV)/.stamp-%: pyproject.toml $(VENV)/constraints.txt
	$(RUN) -m pip install -q --disable-pip-version-check -c $(VENV)/constraints.txt -e '.[$*]'
	@touch $@

$(BENCH)/.stamp: pyproject.toml benchmarks/requirements.txt benchmarks/constraints.txt
	$(PYTHON) -m venv --clear $(BENCH)
	$(BENCH_RUN) -m pip install -q --disable-pip-version-check -c benchmarks/constraints.txt -r benchmarks/requirements.txt -e .
	@touch $@

# The two records below are looked at on each run, but change only if PYTHON or the constraints do.
$(VENV)/constraints.txt: $(VENV)/.python constraints.txt FORCE
	@$(if $(TORCH),sed 's/^torch==.*/torch==$(TORCH)/',cat) constraints.txt > $@.new
	@if cmp -s $@.new $@; then rm $@.new; else mv $@.new $@; fi

# The base prefix is the same inside and outside a virtual environment, so an activated .venv is left as it is.
IDENTITY := import sys; print(sys.base_prefix, sys.version)
$(VENV)/.python: FORCE
	@wanted=$$($(PYTHON) -c '$(IDENTITY)') || exit 1; \
	if test "$$wanted" != "$$($(RUN) -c '$(IDENTITY)' 2>&1)"; then \
		rm -f $@; $(PYTHON) -m venv --clear $(VENV) || exit 1; \
	fi; \
	test -e $@ || echo "$$wanted" > $@

FORCE:
