"""Pictures as prompts: IP-Adapters, and Redux."""

from typing import Any

import pytest
import torch

import afcache
from tests.support.one_graph import TRACED, assert_exact_and_one_graph, counters
from tests.support.pipelines import BY_NAME, draw, load_ip_adapters, make, make_prior, picture

pytestmark = pytest.mark.host


@pytest.mark.parametrize(("adapters", "cfg"), [(1, 1.0), (2, 2.0)])
def test_image_prompts(adapters: int, cfg: float):
    kind = BY_NAME["FluxPipeline"]
    pipe = make(kind, single=1)
    without = draw(pipe, kind)
    load_ip_adapters(pipe, adapters)
    prompts = [torch.randn(1, 1, 16, generator=torch.Generator().manual_seed(i)) for i in range(adapters)]
    # diffusers encodes a black picture for the negative branch if it is not told its embedding.
    negative = [torch.zeros_like(prompt) for prompt in prompts]
    changes: dict[str, Any] = {"ip_adapter_image_embeds": prompts, "negative_ip_adapter_image_embeds": negative}
    if cfg > 1:
        changes |= {"true_cfg_scale": cfg, "negative_prompt": ""}
    assert_exact_and_one_graph(pipe, kind, **changes)
    # Rescaled and unloaded after compile_pipeline.
    pipe.set_ip_adapter_scale(0.2)
    rescaled = draw(pipe, kind, **changes)
    with afcache.uncached(pipe):
        expected = draw(pipe, kind, **changes)
    afcache.compile_pipeline(pipe, tolerance=0.0, compile=False)
    assert (draw(pipe, kind, **changes) - expected).abs().max() < 1e-4
    assert (rescaled - expected).abs().max() < 0.2
    pipe.unload_ip_adapter()
    assert (draw(pipe, kind) - without).abs().max() < 1e-4


def test_image_prompts_rescaled_at_every_step_are_one_graph():
    """A scale is an input of the graph, and another scale is another velocity, of which nothing is known yet."""
    kind = BY_NAME["FluxPipeline"]
    pipe = make(kind, double=1, single=1)
    load_ip_adapters(pipe, 1)

    def fade(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe.set_ip_adapter_scale(0.5 if step < 2 or step > 8 else 0.5 - 0.05 * step)
        return {}

    names = ("callback_on_step_end", "ip_adapter_image_embeds", "negative_ip_adapter_image_embeds")
    changes: dict[str, Any] = dict(zip(names, (fade, [torch.ones(1, 1, 16)], [torch.ones(1, 1, 16)]), strict=True))
    expected = draw(pipe, kind, **changes)
    afcache.compile_pipeline(pipe, tolerance=0.0, backend=TRACED)
    assert (draw(pipe, kind, **changes) - expected).abs().max() < 1e-4
    assert counters()["stats"]["unique_graphs"] == 1
    afcache.compile_pipeline(pipe, afcache.policy("fixed", interval=100, warmup_steps=2), compile=False)
    draw(pipe, kind, **changes)
    assert afcache.report(pipe).pattern() == "FF.FFFFFFFF."


def test_image_prompts_of_groups_that_reuse_attention():
    kind = BY_NAME["FluxPipeline"]
    pipe = make(kind)
    load_ip_adapters(pipe, 1)
    changes: dict[str, Any] = {
        name: [torch.ones(1, 1, 16)] for name in ("ip_adapter_image_embeds", "negative_ip_adapter_image_embeds")
    }
    expected = draw(pipe, kind, **changes)
    settings = afcache.policy("attention", threshold=1.0)
    afcache.compile_pipeline(pipe, settings, compile=False)
    cached = draw(pipe, kind, **changes)
    report = afcache.report(pipe)
    assert report.mlp_evaluations > 0
    assert 1e-6 < (cached - expected).abs().max() < 1.0


def test_prompt_embeddings_of_redux():
    """A picture as the prompt: its tokens follow the text's, which Redux makes 512."""
    kind = BY_NAME["FluxPipeline"]
    pipe = make(kind, single=1)
    prior = make_prior(pipe)
    with pytest.raises(NotImplementedError, match="pipe is a FluxPriorReduxPipeline; supported pipelines are FluxPipeline"):
        afcache.compile_pipeline(prior)
    embeddings = prior(picture(), prompt="a two")
    assert embeddings.prompt_embeds.shape == (1, 512 + 4, 64)
    assert_exact_and_one_graph(pipe, kind, backend=TRACED, prompt=None, **embeddings)
