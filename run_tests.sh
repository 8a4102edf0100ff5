#!/usr/bin/env bash
# Lint, types and tests on a fresh clone. Arguments are passed on to pytest, e.g. ./run_tests.sh -k forecast
set -euo pipefail
cd "$(dirname "$0")"
source environment.sh
make_environment "[test,bench]"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/pyright
exec .venv/bin/python -m pytest "$@"
