"""Which settings are best for each target? Every combination of a grid, on two models of different data.

    python -m bench.search_grid draw --device cuda    # minutes on a GPU, a day on two cores; stop and start again at will
    python -m bench.search_grid rank                  # the best rule for each kind of settings; writes bench/results

bench/search/grid.jsonl.gz holds what was drawn, a line for each cell: seeds 0 to 15 of mini-FLUX and of "strokes". The third
model, "textures", is kept aside, and so are all other seeds.
"""

import argparse
import itertools
import time
from pathlib import Path
from typing import Any

import torch

from afcache import CacheConfig
from bench.record.naming import BENCH, RUNS
from bench.record.recording import write_result
from bench.record.render import table
from bench.search import rules
from bench.search.grid import Cell, Grid, Kind, read
from bench.search.setting import Setting

MODELS = ("mini-flux", "strokes")
SEEDS = range(16)
DRAWN = BENCH / "search" / "grid.jsonl.gz"
OLD = "residual, exponent 1, weight 0"
SETTINGS = tuple(
    itertools.starmap(Setting, ((28, 1.0), (28, 2.0), (50, 1.0), (20, 1.0), (50, 2.0), (20, 2.0), (28, 4.0), (50, 4.0)))
)
TOLERANCES = (0.004, 0.008, 0.012, 0.016, 0.024, 0.032, 0.048, 0.064, 0.096, 0.128, 0.2)
CELLS = tuple(itertools.starmap(Cell, itertools.product(TOLERANCES, (1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0), (0.1, 0.25))))


def kinds() -> list[Kind]:
    """What is static, what is likeliest first."""

    def kind(target: str, exponent: float, weight: float, **more: float) -> Kind:
        tau = more.pop("tau", 1.1)
        name = ", ".join([target, f"exponent {exponent:g}", f"weight {weight:g}"])
        name += "".join(f", {key} {value:g}" for key, value in more.items()) + (f", tau {tau:g}" if tau != 1.1 else "")
        settings = {"target": target, "error_exponent": exponent, "error_weight": weight, "warmup_steps": 2, **more}
        return Kind(name, CacheConfig(**settings), tau)  # pyright: ignore[reportArgumentType]

    laws = ((1.5, 0.5), (1.5, 0.0), (1.0, 0.0), (1.0, 0.5), (2.0, 0.5), (1.5, 1.0), (1.0, 1.0), (2.0, 0.0), (2.0, 1.0))
    first = [kind(target, *law) for law in laws[:4] for target in ("noise", "residual", "velocity")]
    taus = [kind("noise", 1.5, weight, tau=tau) for tau in (1.02, 1.5) for weight in (0.5, 0.0)]
    others = [kind("noise", 1.5, 0.5, warmup_steps=3), kind("noise", 1.5, 0.5, order=2), kind("noise", 1.5, 0.5, order=0)]
    rest = [kind(target, *law) for law in laws[4:] for target in ("noise", "residual", "velocity")]
    return [*first, *taus, *others, *rest]


def draw(arguments: argparse.Namespace) -> None:
    """Draw what is not there yet, until the time is over."""
    started = time.monotonic()
    # Both the reference and the cached image are drawn with the same products.
    torch.set_float32_matmul_precision("high")
    grids = [Grid(model, SEEDS[: arguments.seeds], arguments.runs, arguments.device) for model in arguments.models]
    for kind, setting, grid in itertools.product(kinds()[arguments.part :: arguments.parts], SETTINGS, grids):
        if time.monotonic() - started > 60 * arguments.minutes:
            print("the time is over", flush=True)
            return
        grid.draw(kind, setting, CELLS[:: arguments.every])
        print(f"{time.monotonic() - started:.0f} s: {grid.recipe.name}, {setting}: {kind.name}", flush=True)


def rank(drawn: Path) -> list[dict[str, Any]]:
    """A row for each kind that was drawn everywhere: its best rule, and then what the presets' own rules come to."""
    found = read(drawn)
    curves = {kind: rules.curves_of(found, kind) for kind in dict.fromkeys(each.kind for each in found)}
    places = set(curves[OLD])
    base = rules.speeds_of(curves[OLD], rules.FOR_RESIDUALS)

    def row(kind: str, rule: rules.Rule, note: str = "") -> dict[str, Any]:
        return {"kind": kind, **rule._asdict(), **rules.compare(rules.speeds_of(curves[kind], rule), base), "note": note}

    rows = []
    for kind, its in curves.items():
        if set(its) == places:
            rows.append(max((row(kind, rule) for rule in rules.candidates()), key=lambda row: row["ratio to the old default"]))
    rows.sort(key=lambda row: -row["ratio to the old default"])
    chosen = "noise, exponent 1.5, weight 0.5"
    return [
        *rows,
        row(chosen, rules.FOR_OUTPUTS, 'policy "noise"'),
        row(chosen.replace("noise", "velocity"), rules.FOR_OUTPUTS, 'policy "velocity"'),
        row(OLD, rules.FOR_RESIDUALS, "the old default"),
    ]


def main() -> None:
    """Draw or rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("task", choices=["draw", "rank"])
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--models", nargs="*", default=MODELS)
    add("--runs", type=Path, default=RUNS / "grid.jsonl")
    add("--minutes", type=float, default=1e9, help="what has not begun then is left for another time")
    add("--seeds", type=int, default=len(SEEDS), help="the first so many")
    add("--every", type=int, default=1, help="each so many cells")
    add("--part", type=int, default=0, help="of --parts that share the kinds among processes")
    add("--parts", type=int, default=1)
    add("--drawn", type=Path, default=DRAWN, help="what is ranked")
    arguments = parser.parse_args()
    if arguments.task == "draw":
        draw(arguments)
        return
    rows = rank(arguments.drawn)
    print(table(rows))
    if arguments.drawn == DRAWN:
        notes = [
            "Seeds 0-15 of mini-FLUX and strokes, 20, 28 and 50 steps, CFG 1 and 2, 28 and 50 steps with CFG 4; drawn on one "
            "NVIDIA H200 with torch 2.11, products in TF32. Speeds (times fewer refreshes) at 45, 40 and 36 dB mean PSNR, as "
            "ratios to the old default; geometric means, and the least of all. Of each kind of settings the best of 121 rules "
            "is shown.",
            "max_growth and damping: up to a tolerance of 0.016; their rises for each doubling above it.",
        ]
        write_result("policy_grid", "Search for what follows the tolerance, on two models", rows, notes=notes)


if __name__ == "__main__":
    main()
