import gc
from collections.abc import Iterator

import pytest
import torch
from diffusers import FluxPipeline

import afcache
from tests.support.equal_graphs import remember_graphs
from tests.support.mini_flux import fresh_mini_flux
from tests.support.sampling import shorten


def pytest_collection_finish() -> None:
    """What is imported by now stays; tracing would spend a tenth of its time on looking through it for garbage."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)


@pytest.fixture(scope="session", autouse=True)
def equal_graphs() -> Iterator[None]:
    """What AOT made of a graph serves every test that traces an equal one."""
    forget = remember_graphs()
    yield
    forget()


@pytest.fixture(autouse=True)
def seed() -> int:
    torch.manual_seed(0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return 0


@pytest.fixture(scope="session")
def mini_flux() -> FluxPipeline:
    return fresh_mini_flux()


@pytest.fixture
def pipe(mini_flux):
    """The session's pipeline, given back as it was."""
    scheduler = mini_flux.scheduler
    yield mini_flux
    mini_flux.scheduler = scheduler
    mini_flux.to(torch.float32)
    if "_afcache" in mini_flux.transformer.__dict__:
        afcache.restore_pipeline(mini_flux)


@pytest.fixture
def own() -> FluxPipeline:
    """A pipeline of the test's own, to be changed for good."""
    return fresh_mini_flux()


@pytest.fixture
def short(own) -> FluxPipeline:
    """A pipeline of the test's own, of two blocks: for what is compiled, where their number does not matter."""
    return shorten(own)
