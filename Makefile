# SPDX-License-Identifier: Apache-2.0
SHELL      := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

GO      ?= go
BIN     := bin
OUT     := out
GOFLAGS_BUILD := -trimpath
export CGO_ENABLED ?= 0

.PHONY: help setup build test unit integration lint fmt fuzz demo bench clean lab-clean

help: ## List the targets.
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  \033[1m%-12s\033[0m %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## Install what a Debian or Ubuntu machine lacks (QEMU, guest kernel); elsewhere say what is missing.
	@hack/setup.sh

build: ## Build the agent and the lab into bin/.
	@mkdir -p $(BIN)
	$(GO) build $(GOFLAGS_BUILD) -o $(BIN)/ ./cmd/...

test: setup build ## Everything: unit tests, then real QEMU guests moved by real agents.
	@hack/test.sh all

unit: ## Unit tests only: no QEMU, no root.
	@hack/test.sh unit

integration: setup build ## The real-QEMU runs only (needs root).
	@hack/test.sh integration

lint: ## golangci-lint with the project's configuration.
	$(GO) tool -modfile=hack/tools/go.mod golangci-lint run ./...

fmt: ## Format the code.
	$(GO) tool -modfile=hack/tools/go.mod golangci-lint fmt ./...

fuzz: ## Fuzz every decoder for FUZZTIME each (default 20s).
	@hack/fuzz.sh $${FUZZTIME:-20s}

demo: setup build ## Stock pre-copy, post-copy, post-copy-preempt and scatter-gather side by side; out/demo/report.html.
	@hack/demo.sh

bench: setup build ## The numbers of docs/benchmarks.md, each a ratio taken in one run.
	@hack/bench.sh

lab-clean: ## Remove whatever a crashed lab run left behind.
	$(BIN)/sglab clean

clean: ## Remove build results and the cache.
	rm -rf $(BIN) $(OUT) .cache
