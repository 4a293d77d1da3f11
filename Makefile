# SPDX-License-Identifier: Apache-2.0
#
# One verb per chore.  Each does its own set-up on a bare Debian or Ubuntu: what is missing is installed, what
# is there is used, and a repeat costs nothing.

SETUP := compose/setup
PYTHON := .venv/bin/python
# What the tests do to namespaces, BPF and engines takes root.
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo -E)
# A part that a test needs and that is missing is a failure here, not a skipped test.
CI ?= 1
# make test TESTS="tests/unit -k labels"
TESTS ?= tests
CHAOS ?=
# Two files of tests at a time: most of them wait for timers and engines.  One at a time: make test PARALLEL=
PARALLEL ?= --numprocesses=2 --dist=loadfile --durations=20

.DEFAULT_GOAL := help
.PHONY: help up down certs member join demo test chaos lint format bench bpf venv image clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

up: ## this host: etcd and agent from compose, until `holdfast status` is healthy
	@$(SETUP)/up.sh

down: ## stop the services; what is enforced stays enforced
	@$(SETUP)/down.sh

certs: ## certificates and settings for each machine of INVENTORY=fleet/inventory.yaml
	@$(SETUP)/fleet.sh "$(INVENTORY)"

member: ## this machine: the etcd member of FOLDER=fleet/members/NAME
	@$(SETUP)/member.sh "$(FOLDER)"

join: ## this host: the agent, with FOLDER=fleet/hosts/NAME; see compose/setup/join.sh
	@$(SETUP)/join.sh "$(FOLDER)" "$(ETCD)" "$(OPERATOR)"

demo: ## two containers and a VM: one flow allowed, one denied, and why
	@compose/demo/demo.sh

test: venv bpf ## every test, on the real kernel, etcd and docker
	@$(SETUP)/packages.sh @test @engine
# Some hundred agents are started that write no bytecode: each would compile itself.
	@$(PYTHON) -m compileall -q $(dir $(wildcard */__init__.py))
	$(SUDO) env CI=$(CI) CHAOS=$(CHAOS) $(PYTHON) -m pytest $(PARALLEL) $(TESTS)

chaos: ## all scenarios of failure, those that `make test` leaves out too
	@$(MAKE) --no-print-directory test TESTS=tests/chaos CHAOS=all

lint: venv ## ruff and mypy
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

format: venv ## let ruff rewrite what it can
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

bench: venv bpf ## all figures, or NAME=x for some
	@$(SETUP)/packages.sh @test @engine
	$(SUDO) $(PYTHON) -m bench $(NAME)

bpf: ## compile the kernel half
	@$(SETUP)/packages.sh @build
	@$(MAKE) --no-print-directory -C bpf

venv: ## .venv with the project and its development packages
	@$(SETUP)/python.sh dev >/dev/null

image: ## build the two images with the engine that is found
	@$(SETUP)/up.sh image

clean: ## remove what was built (not the services: make down, holdfast cleanup)
	rm -rf bpf/build compose/.cache .mypy_cache .ruff_cache .pytest_cache
