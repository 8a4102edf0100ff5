"""The recipes of the small models, and how benchmarks sample them."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import afcache
from afcache.assets import recommended_settings
from bench.mini_flux import flow, sampling, text, train
from bench.mini_flux.evaluate import sample, sheet, train_judge
from bench.mini_flux.parts import TEXT_DIM, build_vae
from bench.mini_flux.recipe import MINI_FLUX, RECIPES, STROKES, TEXTURES, Recipe

each = pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))


@each
def test_images_have_the_size_and_range_that_is_promised(recipe: Recipe):
    source = recipe.source("cpu")
    images, classes = source.draw(50, torch.Generator().manual_seed(0))
    assert images.shape == (50, 3, recipe.image_size, recipe.image_size)
    assert images.dtype == torch.float32
    assert -1 <= images.min() < -0.5 < 0.5 < images.max() <= 1
    assert classes.dtype == torch.int64
    assert 0 <= classes.min() < classes.max() < len(recipe.classes)
    again, _ = source.draw(50, torch.Generator().manual_seed(0))
    assert torch.equal(images, again)
    assert recipe.features(images).shape[0] == 50
    assert np.isfinite(recipe.features(images)).all()


@each
def test_a_wording_belongs_to_one_class(recipe: Recipe):
    assert len(recipe.classes) == math.prod(recipe.sizes)
    by_class = [recipe.wordings(*values) for values in recipe.classes]
    assert len({len(wordings) for wordings in by_class}) == 1
    everything = [wording for wordings in by_class for wording in wordings]
    assert len(set(everything)) == len(everything)


@each
def test_consecutive_seeds_show_every_class(recipe: Recipe):
    count = len(recipe.classes)
    assert sorted(map(recipe.class_of, range(100, 100 + count))) == list(range(count))
    for seed in (0, 7, 123):
        assert recipe.classes[recipe.class_of(seed)] == recipe.values_of(seed)
    assert {recipe.subject_of(seed) for seed in range(30, 40)} == set(range(recipe.sizes[0]))


def test_prompts_of_seeds():
    assert sampling.prompt_of(17) == MINI_FLUX.prompt_of(17) == "a handwritten seven on a flower"
    assert STROKES.prompt_of(7) == "a yellow handwritten seven on dark paper"
    assert TEXTURES.prompt_of(3) == "a wide view of coffee"
    # Ten seeds are enough for every colour and both papers.
    for part, size in enumerate(STROKES.sizes):
        assert {STROKES.values_of(seed)[part] for seed in range(10)} == set(range(size))


@each
def test_tokens_hold_every_prompt(recipe: Recipe):
    corpus = text.corpus(recipe)
    for tokenizer in (text.build_clip_tokenizer(recipe), text.build_t5_tokenizer(recipe)):
        ids: Any = tokenizer(corpus).input_ids
        assert max(map(len, ids)) <= recipe.text_length
        assert len({tuple(i) for i in tokenizer([t.lower() for t in corpus]).input_ids}) == len(corpus) // 2


def test_held_out_crops_share_no_pixel_with_training():
    source: Any = TEXTURES.source("cpu")
    width = source._canvas.shape[2]
    source._canvas = (torch.arange(width) / width).view(1, 1, -1, 1).expand(*source._canvas.shape)
    generator = torch.Generator().manual_seed(0)
    images, classes = source.draw(500, generator)
    rightmost = ((images.amax(dim=(1, 2, 3)) + 1) / 2 * width).round()
    assert (rightmost < source._widths[classes] * 0.75).all()
    images, subjects = source.examples(generator, held_out=True)
    leftmost = ((images.amin(dim=(1, 2, 3)) + 1) / 2 * width).round()
    smaller = torch.minimum(source._widths[2 * subjects], source._widths[2 * subjects + 1])
    assert (leftmost >= (smaller * 0.75).long()).all()


def test_judges_read_held_out_images():
    assert train_judge(STROKES)[1] > 0.95
    assert train_judge(TEXTURES)[1] > 0.95


@pytest.mark.host
@each
def test_a_training_step_moves_the_weights(recipe: Recipe):
    trainer = _trainer(recipe, pooled=recipe is not MINI_FLUX)
    before = [param.clone() for param in trainer.transformer.parameters()]
    losses = [trainer.step().item() for _ in range(3)]
    assert all(map(math.isfinite, losses))
    moved = [not torch.equal(a, b) for a, b in zip(before, trainer.transformer.parameters(), strict=True)]
    # Behind gates that started at zero, a few come later.
    assert sum(moved) > 0.7 * len(moved)
    # About 2 to 4 million parameters: 4 to 8 MB in 16 bits.
    assert 2e6 < sum(param.numel() for param in trainer.transformer.parameters()) < 4e6


@pytest.mark.host
def test_training_goes_on_from_its_state(tmp_path: Path):
    trainer = _trainer(MINI_FLUX)
    trainer.step()
    torch.save(trainer.state(), tmp_path / "flow.pt")
    loss = trainer.step()
    other = _trainer(MINI_FLUX)
    other.restore(torch.load(tmp_path / "flow.pt", weights_only=True))
    assert torch.equal(other.step(), loss)


def _trainer(recipe: Recipe, *, pooled: bool = False) -> flow.FlowTrainer:
    torch.manual_seed(0)
    vae = build_vae(recipe).requires_grad_(False)
    vae.register_to_config(shift_factor=0.0, scaling_factor=1.0)
    if pooled:
        latents = flow.Pool(recipe, vae, 6, seed=3, device=torch.device("cpu"))
    else:
        latents = flow.Fresh(recipe.source("cpu"), vae, seed=3)
    prompts = 1 + sum(len(recipe.wordings(*values)) for values in recipe.classes)
    embeddings = torch.randn(prompts, recipe.text_length, TEXT_DIM), torch.randn(prompts, TEXT_DIM)
    return flow.FlowTrainer(recipe, latents, embeddings, steps=100, lr=2e-3, batch=2, seed=0)


def test_a_deadline_sets_the_number_of_steps(monkeypatch: pytest.MonkeyPatch):
    clock = 100.0
    monkeypatch.setattr(train.time, "monotonic", lambda: clock)
    trainer: Any = SimpleNamespace(step_index=0, steps=10**9)
    deadline = train.Deadline(trainer, at=400.0)
    while trainer.step_index < trainer.steps:
        # The first steps are slow, and a neighbour comes after a thousand.
        clock += 1.0 if trainer.step_index < 10 else 0.05 if trainer.step_index < 1000 else 0.1
        trainer.step_index += 1
        deadline.after_step(torch.zeros(()))
        if trainer.step_index == 70:
            assert trainer.steps == pytest.approx(70 + (400 - clock) / 0.05, abs=2)
    assert clock == pytest.approx(400, abs=1)


@pytest.mark.host
def test_mini_flux_is_sampled_as_its_pipeline_does():
    assert recommended_settings(afcache.mini_flux_folder()) == {**sampling.SETTINGS, "true_cfg_scale": 2.0}
    pipe: Any = afcache.load_mini_flux()
    pipe.set_progress_bar_config(disable=True)
    prompts = [f"a handwritten {digit} on a flower" for digit in ("three", "four")]
    generators = [torch.Generator().manual_seed(seed) for seed in (13, 14)]
    options = {"true_cfg_scale": 2.0, "negative_prompt": ["", ""], **sampling.SETTINGS}
    images = pipe(prompts, num_inference_steps=4, generator=generators, output_type="np", **options).images
    ours = sampling.load()
    problem = sampling.prepare(ours, [13, 14], steps=4, cfg=2.0)
    assert np.array_equal(sampling.decode(ours, problem.latents), images)
    assert problem.sigmas.shape == (5,)
    assert len(problem.branches) == 2
    alone = sampling.draw(ours, 13, steps=4, cfg=2.0)
    assert np.abs(alone - images[0]).max() < 1e-3


@pytest.mark.host
@pytest.mark.parametrize("recipe", [STROKES, TEXTURES], ids=lambda recipe: recipe.name)
def test_trained_models_are_small_and_draw_what_they_are_asked_for(recipe: Recipe):
    size = sum(path.stat().st_size for path in recipe.folder.rglob("*") if path.is_file())
    assert size < 12 * 2**20
    assert (recipe.folder / "ATTRIBUTION.md").exists()
    assert recommended_settings(recipe.folder) == {**sampling.settings_of(recipe), "true_cfg_scale": recipe.guidance}
    pipe = sampling.load(recipe)
    images = sample(pipe, 20, cfg=2.0, steps=12, recipe=recipe)
    read = train_judge(recipe)[0].predict(recipe.features(images))
    assert np.mean(read == [recipe.subject_of(seed) for seed in range(20)]) > 0.7


def test_a_sheet_shows_ten_images_a_row(tmp_path: Path):
    path = tmp_path / "sheet.png"
    sheet(torch.zeros(25, 3, 8, 8), str(path))
    with Image.open(path) as picture:
        assert picture.size == (10 * 8 * 4, 2 * 8 * 4)
