# Two commands for a fresh machine with Python 3.11 or 3.12 and nothing else:
#   make demo    environment, install, train preset quickstart, evaluate, dream video, table
#   make test    environment, install, the whole test suite
# A second call does no install work: the stamps below are newer than what they depend on.

CANDIDATES := $(or $(PYTHON),python3.12 python3.11 python3 python)
# ensurepip is asked for because Debian ships Python without it, and venv then fails half-way.
SUITABLE := import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
INSTALL := .venv/bin/python -m pip install --disable-pip-version-check -c constraints.txt
JOBS ?= 2

# The kernels for CUDA run in Triton's interpreter, on any machine. Builds of torch without CUDA come without Triton, and
# torch behaves otherwise where there is one, so it has an environment of its own.
TRITON := triton==3.6.0

.PHONY: help demo test test-kernels lint pictures docs
.DELETE_ON_ERROR:

help:
	@echo "make demo   install, train in dreams, evaluate for real, write the dream video (some minutes)"
	@echo "make test   install, run the test suite on $(JOBS) processes (JOBS=n for more; ARGS='-k scan' to choose)"
	@echo "make test-kernels   install beside it, run the tests of the kernels for CUDA in Triton's interpreter"
	@echo "make lint   install, ruff check, ruff format --check, pyright"
	@echo "make pictures   make the pictures of docs again (ARGS='play watch' to choose)"
	@echo "make docs   install, build the site of docs/ into build/site; every warning is an error"
	@echo "PYTHON=/path/to/python3.12 names the interpreter that .venv is made from."

demo: .venv/installed
	.venv/bin/longdream demo $(ARGS)

# loadfile: the tests of a file share a worker, so that a fixture that takes a small training run is made once. In the
# order of tests/conftest.py, slow files first, rather than by their number of tests.
test: .venv/installed-dev
	.venv/bin/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-kernels: .venv-kernels/installed
	TRITON_INTERPRET=1 .venv-kernels/bin/python -m pytest -n $(JOBS) tests/worldmodel/kernels $(ARGS)

lint: .venv/installed-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 .venv/bin/pyright

pictures: .venv/installed-dev
	.venv/bin/python docs/pictures.py $(ARGS)

# (--quiet would hide warnings from --strict, too, and let them pass)
docs: .venv/installed-dev
	NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build

# pip comes last when an environment is made: where it is missing, an earlier attempt was cut short.
.venv/bin/pip:
	@for p in $(CANDIDATES); do \
	  if "$$p" -c '$(SUITABLE)' >/dev/null 2>&1; then echo "Making .venv with $$p"; exec "$$p" -m venv --clear .venv; fi; \
	done; \
	echo "longdream needs Python 3.11 or 3.12 with its venv module (python3-venv on Debian and Ubuntu); tried: $(CANDIDATES)." \
	  "If you have one elsewhere: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 1

.venv/installed: pyproject.toml constraints.txt | .venv/bin/pip
	$(INSTALL) -e '.[play,video]'
	@touch $@

.venv/installed-dev: pyproject.toml constraints.txt | .venv/bin/pip
	$(INSTALL) -e '.[dev]'
	@touch .venv/installed $@

.venv-kernels/installed: pyproject.toml constraints.txt | .venv/bin/pip
	.venv/bin/python -m venv --clear .venv-kernels
	.venv-kernels/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	.venv-kernels/bin/python -m pip install --disable-pip-version-check --no-deps $(TRITON)
	@touch $@
