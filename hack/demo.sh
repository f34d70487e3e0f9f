#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Moves a real guest by stock QEMU and by scatter-gather, side by side. Arguments
# go to "sglab compare".
set -euo pipefail
cd "$(dirname "$0")/.."
root=()
[ "$(id -u)" -eq 0 ] || root=(sudo --preserve-env=SG_CACHE,SG_AGENT)
exec "${root[@]}" bin/sglab compare --out out/demo "$@"
