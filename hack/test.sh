#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Runs the tests.
#   unit         go vet, and every test that needs neither QEMU nor root
#   integration  the packages whose tests start QEMU, and real guests moved by the real
#                agent (test/...): needs root and what hack/setup.sh installs
#   all          both
set -euo pipefail
cd "$(dirname "$0")/.."
go=${GO:-go}
export CGO_ENABLED=${CGO_ENABLED:-0}

# The packages whose tests start QEMU.
real='/test/|/internal/lab$|/internal/qemu/(qmp|multifd)$'

unit() {
  "$go" vet ./...
  # shellcheck disable=SC2046 # one word for each package
  "$go" test -count=1 -timeout 10m $("$go" list ./... | grep -vE "$real")
}

# Keeps of "go test -v" what somebody watching wants: one line for each test when it
# ends, what it says of itself, and everything of a test that fails.
readable() {
  awk '
    /^=== (RUN|PAUSE|CONT|NAME)/ { if ($2 == "RUN") { printf "    %s ...\n", $3; fflush() } ; next }
    { print; fflush() }'
}

integration() {
  local as=()
  if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null || { echo "test: the real-QEMU runs need root, and there is no sudo: run this as root" >&2; exit 1; }
    as=(sudo --preserve-env=PATH,HOME,GOCACHE,GOMODCACHE,GOFLAGS,GOPROXY,SG_CACHE,CGO_ENABLED)
  fi
  # By its path: sudo may search another one. One package at a time: each of them
  # keeps the processors busy.
  # shellcheck disable=SC2046 # one word for each package
  "${as[@]}" "$(command -v "$go")" test -p 1 $("$go" list ./... | grep -E "$real") -count=1 -timeout 25m -v "$@" | readable
}

case ${1:-all} in
  unit)        unit ;;
  integration) shift; integration "$@" ;;
  all)         unit; integration ;;
  *)           echo "usage: $0 [unit | integration [go test flags] | all]" >&2; exit 2 ;;
esac
