"""A trajectory goes on with what it is of, and is refused elsewhere."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import afcache
from afcache import CacheConfig, Denoised
from bench.mini_flux.sampling import Prepared, prepare
from tests.support.sampling import ADAPTIVE, make_lora

pytestmark = pytest.mark.host
STEPS = 6


@pytest.fixture
def problem(pipe) -> Prepared:
    return prepare(pipe, [0], steps=STEPS, cfg=2.0)


def denoise(transformer: Any, problem: Prepared, **options: Any) -> Denoised:
    prompt, negative = problem.branches
    given = {"negative": negative, "guidance_scale": problem.cfg, "config": ADAPTIVE, **options}
    return afcache.denoise(transformer, prompt, problem.sigmas, **given)


def kept(half: Denoised, folder: Path) -> Denoised:
    """As its file holds it."""
    afcache.save_checkpoint(half, folder / "half")
    return afcache.load_checkpoint(folder / "half")


def test_another_prompt_sigmas_guidance_or_setting_is_refused(pipe, problem, tmp_path: Path):
    half = denoise(pipe.transformer, problem, stop=3)
    prompt, negative = problem.branches
    other_text = prompt._replace(encoder_hidden_states=prompt.encoder_hidden_states + 1e-3)
    later = torch.cat([problem.sigmas[:4], problem.sigmas[4:] * 0.9])
    changes: dict[str, tuple[Prepared, dict[str, Any]]] = {
        r"inputs must be what start was computed with \(digest \w+\), got others \(\w+\): .* Pass the prompt": (
            problem._replace(branches=(other_text, negative)),
            {},
        ),
        "negative must be what start was computed with ": (problem._replace(branches=(prompt, other_text)), {}),
        r"sigmas must be what start was computed over, 7: \(1\.0, .*, got 7: \(1\.0, .* Go on over the same": (
            problem._replace(sigmas=later),
            {},
        ),
        r"guidance_scale must be what start was computed with, 2\.0, got 3\.0": (problem._replace(cfg=3.0), {}),
        r"tolerance, max_growth, damping alone, got order=2 \(start: 1\)": (
            problem,
            {"config": dataclasses.replace(ADAPTIVE, order=2)},
        ),
        r"got warmup_steps=4 \(start: 2\)\. Use dataclasses\.replace": (
            problem,
            {"config": dataclasses.replace(ADAPTIVE, warmup_steps=4)},
        ),
    }
    for start in (half, kept(half, tmp_path)):
        for said, (other, options) in changes.items():
            with pytest.raises(ValueError, match=rf"(?s){said}.*pass start\._replace\(origin=None\)") as caught:
                denoise(pipe.transformer, other, start=start, **options)
            assert len(str(caught.value).splitlines()) == 1


def test_the_same_in_other_tensors_and_another_tolerance_is_not_refused(pipe, problem, tmp_path: Path):
    """Other seeds' latents do not count: the start has its own."""
    half = kept(denoise(pipe.transformer, problem, stop=3), tmp_path)
    whole = denoise(pipe.transformer, problem)
    same = problem._replace(
        branches=tuple(
            each._replace(
                hidden_states=torch.zeros_like(each.hidden_states),
                encoder_hidden_states=each.encoder_hidden_states.clone(),
                txt_ids=each.txt_ids.t().contiguous().t(),
                timestep=each.timestep / 2,
            )
            for each in problem.branches
        ),
        sigmas=problem.sigmas.double(),
    )
    config = dataclasses.replace(ADAPTIVE, tolerance=1.0, max_growth=4.0, damping=0.5)
    assert torch.equal(denoise(copy.deepcopy(pipe.transformer), same, start=half).latents, whole.latents)
    bolder = denoise(pipe.transformer, same, start=half, config=config)
    assert bolder.pattern() != whole.pattern()
    # The settings from there on are the last ones.
    assert bolder.origin is not None
    assert bolder.origin == denoise(pipe.transformer, problem, config=config).origin


@pytest.mark.parametrize("change", ["weights", "config", "adapter", "adapter's scale", "class"])
def test_another_model_is_refused(own, change: str, tmp_path: Path):
    problem = prepare(own, [0], steps=STEPS, cfg=2.0)
    if change == "adapter's scale":
        make_lora(tmp_path)
        own.load_lora_weights(tmp_path, adapter_name="style")
    start = kept(denoise(own.transformer, problem, stop=3), tmp_path)
    transformer = own.transformer
    assert denoise(transformer, problem, start=start, stop=4).pattern()
    with torch.no_grad():
        if change == "weights":
            transformer.single_transformer_blocks[3].proj_out.weight.mul_(1.01)
        elif change == "config":
            transformer.register_to_config(patch_size=2)
        elif change == "adapter":
            make_lora(tmp_path)
            own.load_lora_weights(tmp_path)
        elif change == "adapter's scale":
            own.set_adapters("style", 0.5)
        else:
            transformer.__class__ = type("Another", (type(transformer),), {})
    said = r"transformer must be what start was computed with \(FluxTransformer2DModel, config \w+, weights \w+\), got"
    with pytest.raises(ValueError, match=rf"{said}.*its adapters and their scales included"):
        denoise(transformer, problem, start=start)


def test_a_start_without_an_origin_is_taken_at_its_word(pipe, problem):
    half = denoise(pipe.transformer, problem, stop=3)
    prompt, negative = problem.branches
    swapped = problem._replace(branches=(negative, prompt))
    with pytest.raises(ValueError, match="inputs must be what start was computed with"):
        denoise(pipe.transformer, swapped, start=half)
    by_hand = Denoised(half.latents, half.states, half.records, half.target)
    on = denoise(pipe.transformer, swapped, start=by_hand)
    assert len(on.records) == STEPS
    # What nobody knows stays unknown.
    assert on.origin is None


def test_the_origin_is_no_input_of_the_graph(short, tmp_path: Path):
    """Nor do a file and another tolerance add one."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    step = torch.compile(afcache.denoising_step, fullgraph=True, backend="aot_eager")
    problem = prepare(short, [0], steps=STEPS, cfg=2.0)
    half = kept(denoise(short.transformer, problem, step=step, stop=3), tmp_path)
    config = CacheConfig(target="noise", tolerance=0.5, warmup_steps=2)
    assert denoise(short.transformer, problem, step=step, start=half, config=config).pattern()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
