# The whole developer interface; CI calls the same words.
PYTHON ?= python3
TOOLS := .venv/bin
SCRIPTS := $(wildcard *.py)
SHELL_FILES := $(wildcard lima/*.sh lima/*/*.sh) .ci/run

.PHONY: test test-fast lint check embed docs contract vm-test bench bench-vm bench-proxy bench-egress fuzz-proxy tools clean

test:  ## all but vm-test: a minute, no network, no Lima
	$(PYTHON) -m tests

test-fast:  ## tables: seconds
	$(PYTHON) -m tests --fast

lint: $(TOOLS)/ruff  ## ruff, mypy, shellcheck, and limactl validate when there is one
	$(TOOLS)/ruff check .
	$(TOOLS)/ruff format --check .
	$(TOOLS)/mypy $(SCRIPTS) tests
	$(call when,shellcheck,shellcheck $(SHELL_FILES))
	$(call when,limactl,limactl validate lima/*.yaml)
	$(PYTHON) tests/tools/embed.py --check
	$(PYTHON) tests/tools/options.py --check

check: lint test

embed:  ## copy lima/ into agent_vm.py
	$(PYTHON) tests/tools/embed.py

docs:  ## write docs/options.md from the parsers
	$(PYTHON) tests/tools/options.py

contract:  ## one list of commands against the fake and the real limactl
	$(PYTHON) -m tests _contract.

vm-test:  ## boots real VMs with the limactl on PATH; see "Developing" in the README
	$(PYTHON) -m tests --vm

bench bench-vm:  ## a VM booted, resumed, and by limactl alone: times, CPU, memory; needs a base instance
	$(PYTHON) tests/tools/bench_vm.py

bench-proxy:  ## what the GitHub proxy adds to a call, beside nginx and mitmproxy where they are on PATH
	$(PYTHON) tests/tools/bench_proxy.py

bench-egress:  ## what the VM's way out adds to a direct connection, through ssh too
	$(PYTHON) tests/tools/bench_egress.py

fuzz-proxy:  ## 200,000 made-up messages; what passes is checked by other rules than the proxy's
	$(PYTHON) tests/tools/fuzz_proxy.py

tools $(TOOLS)/ruff:
	$(PYTHON) -m venv .venv
	$(TOOLS)/pip install -q 'ruff>=0.14,<1' 'mypy>=1.18,<3'

clean:
	rm -rf .venv .mypy_cache .ruff_cache

# A missing tool is said; where CI is set, it is an error. limactl refuses to run as root.
when = @if ! command -v $(1) > /dev/null; then echo "SKIP $(1): not installed"; \
	test -z "$$CI" || test $(1) = limactl; \
	elif test $(1) = limactl && test "$$(id -u)" = 0; then echo "SKIP limactl: it refuses root"; \
	else echo "$(2)"; $(2); fi
