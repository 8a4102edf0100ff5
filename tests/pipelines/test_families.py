"""Every family through diffusers' own pipelines, with tiny random models: exact at tolerance 0, one graph, restored."""

import inspect
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.utils import logging

import afcache
from afcache.models.families import KNOWN, draws_videos, family_of, transformers_of
from afcache.models.family import Known
from afcache.models.flux1.family import KNOWN as KNOWN_FLUX1
from tests.support.one_graph import counters
from tests.support.zoo.everything import (
    CACHED,
    KINDS,
    MIXED,
    REFUSED,
    STEPS,
    UNSEEN,
    class_of,
    difference,
    first_of_each_family,
    named,
    options_of,
)
from tests.support.zoo.kind import Kind, draw
from tests.support.zoo.parts_video import HARMLESS

pytestmark = [pytest.mark.host, *map(pytest.mark.filterwarnings, HARMLESS)]

# Of which the whole forward is traced with inductor, too.
MAIN = ("QwenImagePipeline", "Flux2KleinPipeline", "WanPipeline", "StableDiffusion3Pipeline", "ZImagePipeline", "LTXPipeline")
# Latents that are blended with a picture, or given new noise in part, at every step: no velocity of a random model leads there.
BLENDED = ("Inpaint", "LTXConditionPipeline [conditions]")
# Of the modular ones those that decode, too.
DECODING_VIDEOS = (
    "Wan22VaceModularPipeline",
    "WanImage2VideoModularPipeline",
    "LTXModularPipeline",
    "LTX2ModularPipeline",
    "HunyuanVideo15ModularPipeline",
)
# Guidance that has a momentum.
WITH_MOMENTUM = ("HunyuanImagePipeline",)


@named(CACHED)
def test_a_pipeline_is_exact_at_tolerance_zero_and_restored(kind: Kind):
    pipe, options = kind.make(), options_of(kind)
    expected = draw(pipe, kind, steps=STEPS, **options)
    afcache.compile_pipeline(pipe, tolerance=0.0, compile=False)
    assert difference(draw(pipe, kind, steps=STEPS, **options), expected) <= 1e-4
    report = afcache.report(pipe)
    assert set(report.pattern()) == {"F"}
    if "Modular" in kind.name:
        says_so = class_of(kind) in DECODING_VIDEOS
    else:
        says_so = any("video" in name or "frames" in name for name in inspect.signature(type(pipe).__call__).parameters)
    assert (draws_videos(pipe), report.config["warmup_steps"], report.config["error_weight"]) == (
        (True, 3, 0.0) if says_so else (False, 2, 0.5)
    )
    # The latents of each step are where the convention says that the last one's velocities led.
    if not any(word in kind.name for word in BLENDED) and class_of(kind) not in WITH_MOMENTUM:
        assert [restart for restart in report.restarts if restart.reason == "latents"] == []
    afcache.compile_pipeline(pipe, MIXED, compile=False)
    mixed = draw(pipe, kind, steps=STEPS, **options)
    assert torch.isfinite(mixed).all()
    report = afcache.report(pipe)
    if not report.restarts:
        assert difference(mixed, expected) > 0
        assert {"F", "."} <= set(report.pattern())
    afcache.restore_pipeline(pipe)
    assert torch.equal(draw(pipe, kind, steps=STEPS, **options), expected)


@named([kind for kind in CACHED if kind.guided is not None and kind.unguided is not None])
def test_a_pipeline_without_guidance_is_exact(kind: Kind):
    pipe = kind.make()
    expected = draw(pipe, kind, steps=STEPS, **(kind.unguided or {}))
    afcache.compile_pipeline(pipe, tolerance=0.0, compile=False)
    assert difference(draw(pipe, kind, steps=STEPS, **(kind.unguided or {})), expected) <= 1e-4


@named([kind for kind in CACHED if kind.name in ("LTXPipeline", "LTXImageToVideoPipeline")])
def test_guidance_that_looks_at_all_tokens_is_exact(kind: Kind):
    pipe, options = kind.make(), {**options_of(kind), "guidance_rescale": 0.7}
    expected = draw(pipe, kind, steps=STEPS, **options)
    afcache.compile_pipeline(pipe, tolerance=0.0, compile=False)
    assert difference(draw(pipe, kind, steps=STEPS, **options), expected) <= 1e-4


def assert_one_graph(kind: Kind, **how: Any) -> None:
    """Compiled what eager draws; another seed is no graph more, and a longer prompt one at most, for each guidance branch."""
    pipe, options = kind.make(), options_of(kind)
    expected = draw(pipe, kind, steps=STEPS, **options)
    afcache.compile_pipeline(pipe, MIXED, compile=False)
    eager = draw(pipe, kind, steps=STEPS, **options)
    branches = afcache.report(pipe).branches
    counters().clear()
    afcache.compile_pipeline(pipe, MIXED, **how)
    compiled = draw(pipe, kind, steps=STEPS, **options)
    assert difference(compiled, eager) <= 1e-3 * max(1.0, float(eager.abs().max()))
    assert difference(compiled, expected) > 0
    graphs = counters()["stats"]["unique_graphs"]
    assert not counters()["graph_break"]
    traced = [transformer for transformer in transformers_of(pipe) if family_of(transformer).traces(transformer)]
    if traced:
        # Prompts of two lengths are two structures.
        assert len(traced) <= graphs <= branches * len(traced)
    draw(pipe, kind, seed=1, steps=STEPS, **options)
    assert counters()["stats"]["unique_graphs"] == graphs
    draw(pipe, kind, prompt=1, steps=STEPS, **options)
    draw(pipe, kind, prompt=1, seed=1, steps=STEPS, **options)
    assert counters()["stats"]["unique_graphs"] <= 2 * graphs
    afcache.restore_pipeline(pipe)
    assert torch.equal(draw(pipe, kind, steps=STEPS, **options), expected)


@named([kind for kind in first_of_each_family() if class_of(kind) not in MAIN])
@pytest.mark.slow
def test_every_familys_step_is_one_graph(kind: Kind):
    assert_one_graph(kind, backend="aot_eager")


@named([kind for kind in CACHED if kind.name in MAIN])
def test_the_step_of_the_families_that_most_use_is_one_graph(kind: Kind):
    assert_one_graph(kind, backend="aot_eager")


@named([kind for kind in CACHED if kind.name in MAIN])
@pytest.mark.slow
@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex operators")
def test_inductor_takes_the_step(kind: Kind):
    assert_one_graph(kind, backend="inductor")


@named(REFUSED)
def test_what_is_not_cached_is_refused_in_words(kind: Kind):
    """At once, or, of a family that was never seen, when its first step shows what is missing."""
    pipe = kind.make()

    def draw_cached() -> None:
        afcache.compile_pipeline(pipe, compile=False)
        draw(pipe, kind, steps=STEPS, **options_of(kind))

    with pytest.raises(
        NotImplementedError, match=r"is not supported|supported pipelines are|is supported|never seen|draws new noise"
    ):
        draw_cached()


def test_at_least_25_families_are_cached():
    assert len(first_of_each_family()) >= 25


@named([kind for kind in UNSEEN if kind.guided is not None][:1])
def test_a_family_that_was_never_seen_says_so_once(kind: Kind, caplog: pytest.LogCaptureFixture):
    pipe = kind.make()
    logging.get_logger("afcache.models.hosted.unseen").propagate = True
    afcache.compile_pipeline(pipe, compile=False)
    for seed in range(2):
        draw(pipe, kind, seed=seed, steps=STEPS, **options_of(kind))
    said = [record.message for record in caplog.records if "was never seen before" in record.message]
    assert len(said) == 1
    assert afcache.report(pipe).config["target"] == "velocity"


@pytest.mark.parametrize("known", KNOWN, ids=[known.name for known in KNOWN])
def test_classes_that_are_named_exist_and_stand_in_the_table(known: Known):
    page = (Path(__file__).parent.parent.parent / "docs" / "compatibility.md").read_text()
    for name in (*known.transformers, *known.pipelines):
        assert hasattr(diffusers, name), name
    assert all(f"`{name}`" in page for name in known.pipelines)
    tried = {class_of(kind) for kind in KINDS}
    assert known is KNOWN_FLUX1 or set(known.pipelines) <= tried


@named([kind for kind in CACHED if kind.name in MAIN])
@pytest.mark.slow
def test_a_second_size_is_compiled_by_itself(kind: Kind):
    pipe, options = kind.make(), options_of(kind)
    taller = {**options, "height": 2 * kind.arguments(pipe, 0)["height"]}
    afcache.compile_pipeline(pipe, MIXED, compile=False)
    eager = draw(pipe, kind, steps=STEPS, **taller)
    afcache.compile_pipeline(pipe, MIXED, backend="aot_eager")
    draw(pipe, kind, steps=STEPS, **options)
    assert difference(draw(pipe, kind, steps=STEPS, **taller), eager) <= 1e-4


def test_what_was_given_to_one_image_is_not_taken_to_be_given_to_the_next():
    """A picture gives the first frame of one clip; the next, of the same prompt and shape, has none."""
    by_name = {kind.name: kind for kind in CACHED}
    given, free = by_name["Kandinsky5I2VPipeline"], by_name["Kandinsky5T2VPipeline"]
    with_picture = given.make()
    without: Any = diffusers.Kandinsky5T2VPipeline(**with_picture.components)
    text = {name: value for name, value in given.arguments(with_picture, 0).items() if "embeds" in name or "cu_seqlens" in name}
    options = {
        **free.arguments(without, 0),
        **text,
        **(free.unguided or {}),
        "num_frames": given.arguments(with_picture, 0)["num_frames"],
    }
    free = free._replace(arguments=lambda pipe, prompt: options)
    expected = draw(without, free, steps=STEPS)
    for pipe in (with_picture, without):
        afcache.compile_pipeline(pipe, tolerance=0.0, compile=False)
    draw(with_picture, given, steps=STEPS, **(given.unguided or {}))
    assert difference(draw(without, free, steps=STEPS), expected) <= 1e-4


def test_new_noise_at_every_step_is_drawn_where_every_step_is_computed():
    kind = next(kind for kind in REFUSED if kind.name == "CogVideoXPipeline [new noise]")
    pipe, options = kind.make(), options_of(kind)
    expected = draw(pipe, kind, steps=STEPS, **options)
    afcache.compile_pipeline(pipe, afcache.policy("none"), compile=False)
    assert difference(draw(pipe, kind, steps=STEPS, **options), expected) <= 1e-4


def test_two_images_are_no_guidance_branches_because_the_last_call_had_some():
    kind = next(kind for kind in CACHED if kind.name == "ZImagePipeline")
    pipe = kind.make()
    first, second = (kind.arguments(pipe, prompt)["prompt_embeds"][0][:4] for prompt in (0, 1))
    guided = {"prompt_embeds": [first], "negative_prompt_embeds": [second], "guidance_scale": 3.0}
    afcache.compile_pipeline(pipe, MIXED, compile=False)
    draw(pipe, kind, steps=STEPS, **guided)
    assert afcache.report(pipe).branches == 2
    both = {"prompt_embeds": [first, second], "negative_prompt_embeds": None, "guidance_scale": 0.0}
    draw(pipe, kind, steps=STEPS, **both)
    assert afcache.report(pipe).branches == 1


def test_a_refusal_of_the_second_expert_leaves_the_first_alone():
    kind = next(kind for kind in CACHED if kind.name == "WanPipeline [two experts]")
    pipe = kind.make()
    pipe.transformer_2.compile(backend="eager")
    with pytest.raises(NotImplementedError, match="compiled in place"):
        afcache.compile_pipeline(pipe)
    with pytest.raises(ValueError, match="was not passed"):
        afcache.report(pipe)


def test_a_guider_that_hooks_layers_runs_the_models_own_forward(caplog: pytest.LogCaptureFixture):
    kind = next(kind for kind in CACHED if kind.name == "WanModularPipeline [skipped layer]")
    logging.get_logger("afcache.runtime.modes").propagate = True
    pipe = kind.make()
    expected = draw(pipe, kind, steps=STEPS)
    afcache.compile_pipeline(pipe, tolerance=0.0, backend="eager")
    assert difference(draw(pipe, kind, steps=STEPS), expected) <= 1e-4
    assert "SkipLayerGuidance cannot be traced whole" in caplog.text


def test_a_pipeline_without_a_transformer_is_refused():
    kind = next(kind for kind in CACHED if kind.name == "ChromaPipeline")
    pipe = kind.make()
    pipe.transformer = None
    with pytest.raises(ValueError, match="ChromaPipeline whose transformer is None"):
        afcache.compile_pipeline(pipe)
