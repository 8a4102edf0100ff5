#!/usr/bin/env bash
# Lint, types and tests on a fresh clone. Arguments are passed on to pytest, e.g. ./run_tests.sh -k forecast
# ./run_tests.sh --contract also runs the tests of what torch itself does (tests/contract); without it they run where
# constraints.txt has changed since they last passed, which tests/contract/passed_with records.
# ./run_tests.sh --slow also compiles a step of every family of models, some with inductor: half an hour more.
# TEST_PROCESSES (2) tests run at once, each on one thread: more of them only wait for each other on models this small.
set -euo pipefail
cd "$(dirname "$0")"
source environment.sh
arguments=() contract="" chosen="not contract and not slow"
for argument in "$@"; do
    if [ "$argument" = "--contract" ]; then contract=1
    elif [ "$argument" = "--slow" ]; then chosen="not contract"
    else arguments+=("$argument"); fi
done
make_environment "[test,bench,serve]"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
# Beside the tests: by itself it would leave all processors but one without work.
types="$(mktemp)"
.venv/bin/pyright > "$types" 2>&1 &
checking=$!
trap 'kill "$checking" 2> /dev/null || true; rm -f "$types"' EXIT
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Tests that share what is costly to start, such as ranks, are in one group, and run in one process.
pytest=(.venv/bin/python -m pytest --numprocesses "${TEST_PROCESSES:-2}" --dist loadgroup)
constraints="$(cksum < constraints.txt)"
if [ -n "$contract" ] || [ "$constraints" != "$(cat tests/contract/passed_with 2> /dev/null)" ]; then
    "${pytest[@]}" -m contract
    echo "$constraints" > tests/contract/passed_with
fi
status=0
"${pytest[@]}" -m "$chosen and not alone" ${arguments[@]+"${arguments[@]}"} || status=$?
# A fleet starts seven processes, and Ray waits for them for so long and no longer: nothing runs beside it. 5: none was chosen.
.venv/bin/python -m pytest -m "alone and $chosen" ${arguments[@]+"${arguments[@]}"} || [ $? = 5 ] || status=1
wait "$checking" || status=$?
cat "$types"
exit "$status"
