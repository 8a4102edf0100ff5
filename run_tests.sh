#!/usr/bin/env bash
# Lint, types and tests on a fresh clone. Arguments are passed on to pytest, e.g. ./run_tests.sh -k forecast
# TEST_PROCESSES (2) tests run at once, each on one thread: more of them only wait for each other on models this small.
set -euo pipefail
cd "$(dirname "$0")"
source environment.sh
make_environment "[test,bench]"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/pyright
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec .venv/bin/python -m pytest --numprocesses "${TEST_PROCESSES:-2}" "$@"
