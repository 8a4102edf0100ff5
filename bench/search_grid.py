"""Which settings are best for each target? Every combination of a grid, on two models of different data.

    python -m bench.search_grid draw --device cuda    # minutes on a GPU, a day on two cores; stop and start again at will
    python -m bench.search_grid rank                  # what is best at every tolerance; writes bench/results

What is drawn goes to bench/results/policy_grid.jsonl.gz, one line for each cell: seeds 0 to 23 of mini-FLUX and of "strokes".
"textures" is kept aside, and so are all other seeds.
"""

import argparse
import itertools
import time
from pathlib import Path

import torch

from afcache import CacheConfig
from bench.record.naming import RUNS
from bench.search.grid import Cell, Grid, Kind
from bench.search.setting import Setting

MODELS = ("mini-flux", "strokes")
SEEDS = range(24)
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


def main() -> None:
    """Draw or rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("task", choices=["draw"])
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--models", nargs="*", default=MODELS)
    add("--runs", type=Path, default=RUNS / "grid.jsonl")
    add("--minutes", type=float, default=1e9, help="what has not begun then is left for another time")
    add("--seeds", type=int, default=len(SEEDS), help="the first so many")
    add("--every", type=int, default=1, help="each so many cells")
    add("--part", type=int, default=0, help="of --parts that share the kinds among processes")
    add("--parts", type=int, default=1)
    draw(parser.parse_args())


if __name__ == "__main__":
    main()
