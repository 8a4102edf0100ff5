"""How a runtime, which owns its states, updates their history."""

import torch
from torch import Tensor

from afcache.functional import forecast
from afcache.functional.step import HistoryWriter
from afcache.runtime.compiled import CompileOptions

# The first release for which tests/contract shows that a branch of torch.cond may write to its operands.
_WRITES_IN_BRANCHES = "2.13"


def write_newest(history: Tensor, newest: Tensor, refresh: Tensor) -> None:
    """Shift `newest` into the history's own memory: the `HistoryWriter` of a runtime, which owns its states.

    Cached steps then touch the history by reading it once.
    """
    history.copy_(forecast.push(history, newest, refresh))


def history_writer(options: CompileOptions) -> HistoryWriter | None:
    """How the history is updated: in place, or, where that cannot or should not be, as a fresh value (None).

    Compiled with dynamic shapes, a branch that writes specialises on every size (torch 2.13), so that each new resolution
    would be one more graph; a copy of the history costs little (`python -m bench.overhead parts`).
    """
    if not options.enabled:
        return write_newest
    # A state that lives in CUDA-graph memory is cloned after each call: writing into it would be lost.
    can_write = torch.__version__ >= _WRITES_IN_BRANCHES and not options.uses_cuda_graphs
    return write_newest if can_write and options.dynamic is False else None
