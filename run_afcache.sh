#!/usr/bin/env bash
# The main job on a fresh clone: draws with and without the cache, and shows both.
# Arguments are passed on, e.g. ./run_afcache.sh --prompt "a handwritten two on a palace" --seed 3
set -euo pipefail
cd "$(dirname "$0")"
source environment.sh
make_environment ""
exec .venv/bin/python -m afcache generate --compare "$@"
