"""One rank of a layout: draws its tasks, tells its stories, and writes down what it drew and met."""

import gc
import os
from pathlib import Path

import torch

from afcache import ParallelConfig
from tests.support import parallel_mishaps
from tests.support.parallel_cases import CASES, Drawn, draw, make_pipeline
from tests.support.parallel_layouts import Layout, Met, Task, write


def draw_task(layout: Layout, task: Task) -> Drawn:
    case = CASES[task.case]
    case = case if task.is_compiled else case._replace(backend=None)
    parallel = ParallelConfig(**layout.degrees, backend="gloo", check_decisions=task.is_checked)
    return draw(make_pipeline(case.steered_by, case.blocks), case, parallel)


def main(layout: Layout, folder: Path) -> None:
    torch.set_num_threads(1)
    # As in conftest: what is imported by now stays.
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)
    rank = parallel_mishaps.RANK = int(os.environ["RANK"])
    met = Met({task: draw_task(layout, task) for task in layout.tasks}, {})
    for story in layout.stories:
        # The last one may be a rank's end.
        write(folder, rank, met)
        met.stories[story] = parallel_mishaps.STORIES[story](folder)
    write(folder, rank, met)
    if layout.survivors:
        # Nothing more is owed to ranks that are gone.
        os._exit(0)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
