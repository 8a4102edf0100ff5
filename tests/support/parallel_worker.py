"""One rank of a parallel run: draws cases, and saves what it drew. Started by torchrun."""

import argparse
import os
from pathlib import Path

import torch

from afcache import ParallelConfig
from tests.support.parallel_cases import CASES, draw, make_pipeline


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("cases", nargs="+")
    for name in ("ulysses", "ring", "cfg", "data"):
        parser.add_argument(f"--{name}", type=int, default=1)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    parallel = ParallelConfig(
        ulysses_degree=arguments.ulysses,
        ring_degree=arguments.ring,
        cfg_degree=arguments.cfg,
        data_degree=arguments.data,
        backend="gloo",
        check_decisions=arguments.check,
    )
    drawn = {}
    for name in arguments.cases:
        pipe = make_pipeline(CASES[name].steered_by)
        drawn[name] = draw(pipe, CASES[name], parallel)._asdict()
    torch.save(drawn, arguments.output / f"rank{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
