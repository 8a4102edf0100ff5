"""The one place that makes xfuser importable where there is no GPU, so that parallel runs work on CPU processes with gloo.

xfuser 0.7 imports triton in one module and asks for an accelerator when it is imported, and takes yunchang, which makes the
groups of Ulysses and ring parallelism, for missing on a CPU: `ulysses_degree=2` would silently become 1. `import_on_cpu` stands
in for what is missing. Nothing of xfuser is used afterwards but its process groups.
"""

import contextlib
import importlib
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch

_KERNELS = "xfuser.core.sparge_attention.block_mask"


def import_on_cpu() -> None:
    """Import xfuser with its environment answering for a CPU; does nothing if it was imported before.

    Raises:
        ImportError: xfuser or yunchang is not installed, or this release needs more than we stand in for.

    """
    if "xfuser.core.distributed.parallel_state" in sys.modules:
        return
    with _stub_kernels():
        envs: Any = _import_envs()
        envs.get_device_version = lambda: "0.0"
        # A CUDA build of torch counts as a GPU there, even where there is none.
        envs.get_device_name = lambda: "cpu"
        envs.get_device = lambda local_rank: torch.device("cpu")
        envs.get_torch_distributed_backend = lambda: "gloo"
        envs.PACKAGES_CHECKER.packages_info["has_long_ctx_attn"] = True
        importlib.import_module("xfuser")
        usp: Any = importlib.import_module("xfuser.model_executor.layers.usp")
    usp.PROCESS_GROUP = importlib.import_module("yunchang.globals").PROCESS_GROUP


def _import_envs() -> types.ModuleType:
    """`xfuser.envs` without the package around it, whose import would already ask for an accelerator."""
    specification = importlib.machinery.PathFinder.find_spec("xfuser")
    if specification is None:
        raise ImportError("xfuser is not installed")
    package = types.ModuleType("xfuser")
    package.__path__ = list(specification.submodule_search_locations or [])
    sys.modules["xfuser"] = package
    try:
        return importlib.import_module("xfuser.envs")
    finally:
        del sys.modules["xfuser"]


@contextlib.contextmanager
def _stub_kernels() -> Iterator[None]:
    """Stand in for the one module of xfuser that imports triton unconditionally, where there is none; gone afterwards."""
    if importlib.util.find_spec("triton") is not None:
        yield
        return
    sys.modules[_KERNELS] = _Stub(_KERNELS)
    try:
        yield
    finally:
        del sys.modules[_KERNELS]


class _Stub(types.ModuleType):
    """A module that has whatever is imported from it; nothing of it is ever called."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return None
