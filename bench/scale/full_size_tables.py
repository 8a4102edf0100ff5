"""Tables of `bench/full_size.py --gpu`, written after every row: what was measured is kept, whatever ends the run."""

import argparse

from afcache.settings.presets import DEFAULT_TARGET
from bench.models.random_flux import SIZES
from bench.record.recording import write_result
from bench.record.render import table
from bench.scale.full_size_rows import FEW, Row
from bench.scale.full_size_subject import TEXT_TOKENS

NOTES = {
    "steps": "First calls are cold: caches in a fresh folder. Efficiency: speed-up over the plain compiled model by the "
    "medians of steps, over what the skipped blocks promise. Waits: how often the host waits for the device between the "
    "starts of two calls, at most, by the profiler (on a CPU: values read, among them two checks of the timestep that "
    "accelerators do without, and the host's own predicate where decisions are made ahead). Live: the default preset's "
    "tolerance; decisions on random weights mean nothing.",
    "variants": f"A cached step runs no block, so AFCache has {FEW.double} + {FEW.single} blocks here; the plain model has "
    "all, compiled block by block, in rows without a mode. Live decisions are read at every step, those made ahead once a "
    "refresh.",
    "equality": "Largest values are those of the right side. What compiling alone changes is the yardstick.",
}
UNFINISHED = "Written on the way: what has no row had not been measured when the run ended."


class Tables:
    """All rows so far.

    Args:
        arguments: of the command line.

    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.rows: dict[str, list[Row]] = {name: [] for name in NOTES}
        self._arguments = arguments

    def add(self, name: str, row: Row) -> None:
        """Print one more row of a table, and write the table."""
        print({key: value for key, value in row.items() if value not in ("-", "")}, flush=True)
        self.rows[name].append(row)
        self._write(name, UNFINISHED)

    def finish(self) -> None:
        """Print and write everything: the run has come to its end."""
        for name, rows in self.rows.items():
            if not rows:
                # Nothing of it was asked for.
                continue
            self._write(name)
            print(table(rows))

    def _write(self, name: str, *notes: str) -> None:
        arguments, size = self._arguments, SIZES[self._arguments.size]
        of_what = (
            f'Target "{arguments.target}". Random weights, {size.double} + {size.single} blocks, hidden {size.dim}, bfloat16, '
            f"{size.tokens} image and {TEXT_TOKENS} text tokens, {arguments.steps} steps, {arguments.rounds} images after one "
            f"that warms up, backend {arguments.backend}. Median (quartiles). Costs, never quality."
        )
        title = f"FLUX.1-dev at its real size, {name}" if arguments.size == "flux1" else f"A small FLUX, {name}"
        kind = "" if arguments.target == DEFAULT_TARGET else f"{arguments.target}_"
        subject, where = f"full_size_{arguments.size}_{kind}{name}", {"device": arguments.device, "folder": arguments.output}
        write_result(subject, title, self.rows[name], notes=[of_what, NOTES[name], *notes], **where)
