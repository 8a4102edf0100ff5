#!/usr/bin/env bash
# The main job on a fresh clone: draws with and without the cache, and shows both.
# Arguments are passed on, e.g. ./run_afcache.sh --prompt "a handwritten two on a palace" --seed 3
# ./run_afcache.sh serve, with the options of 'afcache serve', draws over HTTP instead.
# --nproc N starts N processes, one for each GPU, that draw together: ./run_afcache.sh --nproc 2 --ring 2
set -euo pipefail
cd "$(dirname "$0")"
source environment.sh

if [ "${1:-}" = serve ]; then
    make_environment "[serve]"
    exec .venv/bin/python -m afcache "$@"
fi

processes=""
arguments=()
while [ $# -gt 0 ]; do
    case "$1" in
        --nproc) processes="${2:-}"; shift; [ $# -eq 0 ] || shift ;;
        --nproc=*) processes="${1#--nproc=}"; shift ;;
        *) arguments+=("$1"); shift; continue ;;
    esac
    [[ "$processes" =~ ^[1-9][0-9]*$ ]] || {
        echo "$0: error: --nproc must be a whole number >= 1, got '$processes'" >&2
        exit 2
    }
done

make_environment ""
if [ "${processes:-1}" = 1 ]; then
    exec .venv/bin/python -m afcache generate --compare "${arguments[@]}"
fi
# CPU processes share the cores; GPU processes hardly use them.
threads=$(($(getconf _NPROCESSORS_ONLN) / processes))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"
exec .venv/bin/python -m torch.distributed.run --standalone --nproc-per-node "$processes" \
    -m afcache generate --compare "${arguments[@]}"
