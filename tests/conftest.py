import copy

import pytest
import torch
from diffusers import FluxPipeline

import afcache
from tests.support.sampling import shorten


@pytest.fixture(autouse=True)
def seed() -> int:
    torch.manual_seed(0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return 0


@pytest.fixture(scope="session")
def mini_flux() -> FluxPipeline:
    pipe = afcache.load_mini_flux()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(mini_flux):
    """The session's pipeline, given back as it was."""
    scheduler = mini_flux.scheduler
    yield mini_flux
    mini_flux.scheduler = scheduler
    mini_flux.to(torch.float32)
    if "_afcache" in mini_flux.transformer.__dict__:
        afcache.restore_pipeline(mini_flux)


@pytest.fixture(scope="session")
def untouched() -> FluxPipeline:
    """What pipelines of tests' own are copies of; never drawn with."""
    pipe = afcache.load_mini_flux()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def own(untouched) -> FluxPipeline:
    """A pipeline of the test's own, to be changed for good."""
    return copy.deepcopy(untouched)


@pytest.fixture
def short(own) -> FluxPipeline:
    """A pipeline of the test's own, of three blocks: for what is compiled, where their number does not matter."""
    return shorten(own)
