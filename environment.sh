# Sourced by run_afcache.sh and run_tests.sh: makes the virtual environment .venv once, then reuses it.
# Usage: make_environment EXTRAS, where EXTRAS is "" or e.g. "[serve]".

make_environment() {
    local extras="$1"
    local stamp=".venv/.installed${extras//[^a-z]/_}"
    # A change of what is declared installs again; a second run with nothing new starts at once.
    if [ -f "$stamp" ] && [ "$stamp" -nt pyproject.toml ] && [ "$stamp" -nt constraints.txt ] && [ "$stamp" -nt constraints-serve.txt ]; then
        return
    fi
    local python="${PYTHON:-python3}"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "$0: Python 3.11 or newer is needed, $("$python" --version) found; set PYTHON to another one." >&2
        exit 1
    }
    echo "Setting up .venv (once; torch is a large download) ..."
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --quiet --disable-pip-version-check \
        --constraint constraints.txt --constraint constraints-serve.txt --editable ".$extras"
    touch "$stamp"
}
