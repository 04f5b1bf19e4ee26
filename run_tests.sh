#!/usr/bin/env bash
# The whole test suite, with everything it needs. Extra words go to pytest: bash run_tests.sh -k template
# Files run side by side, one on each core; -n 0 runs them one after another.
set -euo pipefail
cd "$(dirname "$0")"
. ./setup_environment.sh
install_requirements requirements.txt
install_requirements requirements-dev.txt
ruff check .
ruff format --check .
mypy
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
