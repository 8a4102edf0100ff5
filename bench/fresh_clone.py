"""The README's first command as a newcomer runs it: in a fresh clone, with a new environment; what it prints is kept.

python -m bench.fresh_clone
"""

import shutil
import subprocess
import tempfile
from pathlib import Path

from bench.record.clock import seconds_of
from bench.record.naming import RESULTS
from bench.record.recording import write_result

COMMAND = "./run_afcache.sh"


def main() -> None:
    """Clone, run, and write bench/results."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "clone", "--quiet", ".", folder], check=True)
        result, seconds = seconds_of(
            lambda: subprocess.run([COMMAND], cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
        )
        shutil.copy(Path(folder) / "outputs" / "compare.png", RESULTS / "run_afcache_compare.png")
    print(result.stdout)
    write_result(
        "run_afcache",
        f"{COMMAND} in a fresh clone",
        [{"command": COMMAND, "seconds, set-up included": seconds}],
        notes=[
            "Wall clock is the median of 3 images, in turns, after warm-up.",
            "",
            "```",
            *result.stdout.splitlines(),
            "```",
            "",
        ],
    )


if __name__ == "__main__":
    main()
