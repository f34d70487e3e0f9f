#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# What "make bench" runs: the Go benchmarks, then the table of docs/benchmarks.md.
# QUICK=1 measures once with smaller guests; BENCHTIME is how long each Go benchmark
# runs; arguments are handed to "sglab bench".
set -euo pipefail
cd "$(dirname "$0")/.."

out=out/bench
mkdir -p "$out"
options=(--out "$out" --micro "$out/micro.txt" --write-doc docs/benchmarks.md)
if [[ -n "${QUICK:-}" ]]; then
	options+=(--quick)
fi

echo "Go benchmarks, into $out/micro.txt"
# Their own Go programs, without the lab's: those boot guests.
packages=$(go list ./internal/... | grep -v /internal/lab)
# shellcheck disable=SC2086 # a list
go test -run '^$' -bench . -benchmem -benchtime "${BENCHTIME:-1s}" $packages |
	tee "$out/micro.txt" | grep --line-buffered '^Benchmark' || {
	echo "the Go benchmarks failed: see $out/micro.txt" >&2
	exit 1
}

if [[ $EUID -ne 0 ]]; then
	echo "The lab makes network namespaces: asking sudo for root."
	exec sudo --preserve-env=PATH,SG_CACHE,SG_AGENT bin/sglab bench "${options[@]}" "$@"
fi
exec bin/sglab bench "${options[@]}" "$@"
