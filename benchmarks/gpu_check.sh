#!/usr/bin/env bash
# What only a GPU shows, in ten minutes at most: a line PASS, FAIL or SKIPPED with figures for each item. No network.
#   benchmarks/gpu_check.sh                      on a machine with a GPU
#   benchmarks/gpu_check.sh --cpu                what of it runs anywhere, on a tiny model
#   benchmarks/gpu_check.sh --only zero2,zero3
set -euo pipefail
cd "$(dirname "$0")/.."
exec python -m benchmarks.gpu_check "$@"
