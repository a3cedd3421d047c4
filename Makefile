# The same few commands for people and for CI. `make demo` and `make test` each work alone in a fresh clone.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

export DS_BUILD_OPS := 0

.PHONY: install demo test test-campaigns test-nvme test-slurm test-compose lint bench clean

install: $(STAMP)

# torch comes first and by its exact version: a range would fetch the newest build, several GB on Linux.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || \
		{ echo "Espalier needs Python 3.11, 3.12 or 3.13; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install "$(TORCH)" -c constraints.txt
	$(BIN)/python -m pip install -e ".[dev]" -c constraints.txt
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/espalier demo

test: $(STAMP)
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m "not campaign and not compiler and not compose and not slurm"

# Whole jobs whose ranks, workers and coordinators are killed: minutes each, which `make test` leaves out.
test-campaigns: $(STAMP)
	$(BIN)/python -m pytest -n 3 --dist loadfile tests/launcher -m campaign

# The optimizer on a real disk; needs a C++ compiler and libaio's headers.
test-nvme: $(STAMP)
	$(BIN)/python -m pytest tests/parallelism/test_nvme.py -m compiler

# Jobs on a real Slurm of two nodes, which are network namespaces of this machine; needs root, for them, for the daemons,
# and to install these (Debian).
test-slurm: $(STAMP)
	command -v munged && command -v slurmd && command -v slurmctld && command -v slurmrestd && command -v ip || \
		{ apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
			slurm-wlm munge slurmrestd slurm-wlm-jwt-plugin iproute2; }
	$(BIN)/python -m pytest tests/slurm -m slurm

# docker-compose.yml on a Docker engine of the tests' own; needs root, for the engine and to install it (Debian).
test-compose: $(STAMP)
	command -v dockerd && command -v docker-compose && command -v debootstrap && command -v iptables && command -v npm || \
		{ apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
			docker.io docker-compose debootstrap iptables ca-certificates $$(command -v npm > /dev/null || echo npm); }
	$(BIN)/python -m pytest tests/compose -m compose

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP)
	@for script in benchmarks/*/bench.py; do echo "== $$script"; $(BIN)/python "$$script" || exit 1; done

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
