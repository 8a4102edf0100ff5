"""mini-Wan's recipe: its clips, its prompts, and a tiny run of every stage."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline

from bench.mini_wan import autoencoder, data, evaluate, flow, parts, text, train


@pytest.fixture(scope="module")
def clips() -> tuple[torch.Tensor, torch.Tensor]:
    return data.Clips(0).draw(64)


@pytest.fixture(scope="module")
def encoders() -> tuple[Any, Any]:
    torch.manual_seed(0)
    tokenizer = text.build_tokenizer()
    return tokenizer, text.build_encoder(tokenizer).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLWan:
    torch.manual_seed(0)
    vae = parts.build_vae().eval().requires_grad_(False)
    autoencoder.set_latent_scale(vae, data.Clips(1).draw(4)[0])
    return vae


def trainer_of(vae: Any, encoders: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> flow.FlowTrainer:
    """A trainer of two blocks whose batches hold two clips."""
    monkeypatch.setattr(parts, "LAYERS", 2)
    pool = flow.Pool(vae, size=4, chunk=2, seed=3, device="cpu")
    embeddings = train.embed_prompts(*encoders)
    return flow.FlowTrainer(pool, embeddings, steps=12, lr=2e-3, batch=2, renew_every=4)


def test_clips_have_the_shape_and_range_that_the_pipeline_draws(clips):
    shown, classes = clips
    assert shown.shape == (64, 3, data.FRAMES, data.IMAGE_SIZE, data.IMAGE_SIZE)
    assert shown.dtype == torch.float32
    assert -1 <= shown.min() < -0.9
    assert 0.95 < shown.max() <= 1
    assert [len(column.unique()) for column in classes.unbind(1)] == [10, 4, 2]


def test_a_digit_moves_the_way_that_its_prompt_says(clips):
    shown, classes = clips
    motion = evaluate.motions(shown)
    for (x, y), (_, way, _) in zip(motion.tolist(), classes.tolist(), strict=True):
        along, across = {"left": (-x, y), "right": (x, y), "up": (-y, x), "down": (y, x)}[data.WAYS[way]]
        assert along > 7
        assert abs(across) < 2
    assert (evaluate.judge_ways(shown) == classes[:, 1].numpy()).all()


def test_a_digit_never_stops_nor_turns():
    x, y = data._paths(torch.tensor([0, 1, 2, 3] * 50), torch.Generator().manual_seed(0), data.FRAMES)
    moving = torch.stack([x[0::4], x[1::4], y[2::4], y[3::4]])
    steps = moving.diff(dim=-1) * torch.tensor([-1.0, 1.0, -1.0, 1.0])[:, None, None]
    assert steps.min() > 0.2
    assert 10 <= steps.sum(-1).min() <= steps.sum(-1).max() <= 13
    assert torch.stack([y[0::4], y[1::4], x[2::4], x[3::4]]).diff(dim=-1).abs().max() == 0


def test_no_digit_is_cut():
    count = 64
    generator = torch.Generator().manual_seed(0)
    black = torch.zeros(2, 3, 100, 100)
    ways = torch.arange(count) % 4
    full = torch.ones(count, 1, 8, 8)
    shown = (data.render(full, ways, torch.zeros_like(ways), black, generator) + 1) / 2
    area = shown[:, 0].sum((-2, -1))
    torch.testing.assert_close(area, torch.full_like(area, data.DIGIT_SIZE**2), rtol=1e-3, atol=0)


def test_backgrounds_pan_slowly_and_stay_darker_than_digits():
    generator = torch.Generator().manual_seed(0)
    places = torch.arange(8) % 2
    shown = data.render(torch.zeros(8, 1, 8, 8), places, places, data.stack_photographs(), generator)
    assert (shown + 1).max() / 2 <= data.BACKGROUND_GAIN + 1e-6
    change = (shown[:, :, 1:] - shown[:, :, :-1]).abs().mean((1, 2, 3, 4))
    assert (change > 0).all()
    assert change.mean() < 0.1


def test_the_same_seed_gives_the_same_clips():
    first, again, other = (data.Clips(seed).draw(2)[0] for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_prompts_cover_all_classes_and_no_two_classes_share_a_wording():
    assert {data.class_of(seed) for seed in range(40, 40 + data.CLASSES)} == set(text._CLASSES)
    assert len({data.class_of(seed)[1:] for seed in range(8)}) == 8
    wordings = text.wordings()
    assert len(set(wordings)) == len(wordings) == 28 * data.CLASSES
    assert data.prompt(7, 0, 1) == "a handwritten seven moves left over a flower"
    assert data.prompt_of(0) in wordings


def test_every_prompt_fits_and_is_encoded_as_the_pipeline_does_it(vae, encoders):
    tokenizer, encoder = encoders
    lengths = [len(tokenizer(prompt).input_ids) for prompt in text.corpus()]
    assert max(lengths) <= text.TEXT_LENGTH
    pipe = train.build_pipeline(tokenizer, encoder, vae, parts.build_transformer())
    prompts = ["", "the digit 7 slides up over a dahlia", "anything else"]
    theirs = pipe.encode_prompt(prompts, max_sequence_length=text.TEXT_LENGTH, do_classifier_free_guidance=False)[0]
    torch.testing.assert_close(text.encode(prompts, *encoders), theirs)


def test_a_little_training_tells_the_words_apart(capsys):
    text.train(steps=60, seed=0)
    accuracies = json.loads(capsys.readouterr().out.split("place: ")[1])
    assert min(accuracies) > 0.9


def test_two_passes_are_what_the_autoencoder_does_piece_by_piece(vae, clips):
    shown = clips[0][:2]
    with torch.no_grad():
        ours, theirs = autoencoder.encode(vae, shown), vae.encode(shown).latent_dist
        assert ours.mean.shape == (2, parts.LATENT_CHANNELS, 9, 16, 16)
        torch.testing.assert_close(ours.mean, theirs.mean, rtol=1e-4, atol=1e-5)
        latents = 20 * torch.randn(ours.mean.shape)
        decoded = autoencoder.decode(vae, latents).clamp(-1, 1)
        torch.testing.assert_close(decoded, vae.decode(latents).sample, rtol=1e-4, atol=1e-5)
        unit = autoencoder.unit_latents(vae, data.Clips(1).draw(4)[0])
    torch.testing.assert_close(unit.std((0, 2, 3, 4)), torch.ones(parts.LATENT_CHANNELS), rtol=1e-3, atol=0)


def test_the_autoencoder_learns_and_is_kept(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(autoencoder, "_CHECKED", 2)
    vae = autoencoder.load_or_train(tmp_path / "vae", steps=4, seed=0)
    assert "autoencoder step 4" in capsys.readouterr().out
    assert any(mean != 0 for mean in vae.config.latents_mean)
    again = autoencoder.load_or_train(tmp_path / "vae", steps=4, seed=0)
    assert capsys.readouterr().out == ""
    assert again.config.latents_std == vae.config.latents_std


def test_the_flow_stage_learns_resumes_and_masks_fast_sinusoids(vae, encoders, monkeypatch):
    trainer = trainer_of(vae, encoders, monkeypatch)
    before = trainer.pool.latents.clone()
    losses = [float(trainer.step()) for _ in range(8)]
    assert sum(losses[-4:]) < sum(losses[:4])
    assert not torch.equal(before, trainer.pool.latents)
    weight = trainer.transformer.condition_embedder.time_embedder.linear_1.weight
    assert (weight.abs().sum(0) > 0).equal(trainer.mask > 0)
    assert trainer.learning_rate() < trainer.base_lr
    other = trainer_of(vae, encoders, monkeypatch)
    other.restore(trainer.state())
    other.pool.latents, other.pool.classes = trainer.pool.latents, trainer.pool.classes
    assert float(other.step()) == pytest.approx(float(trainer.step()), rel=1e-5)


def test_a_trainer_sees_its_noise_levels_alone(vae, encoders, monkeypatch):
    trainer = trainer_of(vae, encoders, monkeypatch)
    trainer.batch = 4096
    whole = trainer._draw_sigma()
    assert whole.min() < 0.05
    assert whole.max() > 0.95
    for trainer.noise_levels in train.EXPERTS.values():
        least, most = trainer.noise_levels
        sigma = trainer._draw_sigma()
        torch.testing.assert_close(torch.stack([sigma.min(), sigma.max()]), torch.tensor([least, most]), rtol=0, atol=0.03)
        assert sigma.min() >= least
        assert sigma.max() <= most


@pytest.mark.host
def test_a_trained_model_becomes_two_experts(vae, encoders, monkeypatch, tmp_path: Path, capsys):
    monkeypatch.setattr(parts, "LAYERS", 2)
    start, output = tmp_path / "start", tmp_path / "experts"
    tokenizer, encoder = encoders
    train.export(start, train.build_pipeline(tokenizer, encoder, vae, parts.build_transformer().eval()))
    command = f"train --experts --steps 2 --batch 2 --pool 4 --chunk 2 --work {tmp_path} --output {output}"
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(SystemExit):
        train.main()
    assert "give --start FOLDER" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*command.split(), "--start", str(start)])
    train.main()
    begun: Any = WanPipeline.from_pretrained(start)
    pipe: Any = WanPipeline.from_pretrained(output)
    assert pipe.config.boundary_ratio == train.BOUNDARY
    weights = [model.blocks[0].attn1.to_q.weight for model in (begun.transformer, pipe.transformer, pipe.transformer_2)]
    distances = [float(((other - weights[0]).norm() / weights[0].norm()).detach()) for other in weights[1:]]
    assert all(0 < distance < 0.2 for distance in distances)
    assert not torch.equal(*weights[1:])
    assert begun.transformer_2 is None
    for name, weight in begun.vae.state_dict().items():
        assert torch.equal(weight, pipe.vae.state_dict()[name])
    pipe.set_progress_bar_config(disable=True)
    settings = json.loads((output / "recommended.json").read_text())
    assert evaluate.sample(pipe, 1, **{**settings, "num_inference_steps": 3}).shape[0] == 1


def test_the_schedule_ends_in_time(vae, encoders, monkeypatch):
    trainer = trainer_of(vae, encoders, monkeypatch)
    trainer.steps, saved = None, []
    clock = iter(range(100_000))
    monkeypatch.setattr(flow.time, "monotonic", lambda: float(next(clock)))

    def step() -> torch.Tensor:
        trainer.step_index += 1
        next(clock)
        return torch.ones(())

    monkeypatch.setattr(trainer, "step", step)
    flow.train(trainer, deadline=500.0, save=lambda: saved.append(trainer.step_index))
    assert trainer.steps is not None
    assert 400 < trainer.steps < 500
    assert saved == [trainer.steps]


@pytest.mark.host
def test_what_is_exported_loads_and_draws(vae, encoders, monkeypatch, tmp_path: Path):
    monkeypatch.setattr(parts, "LAYERS", 2)
    torch.manual_seed(0)
    tokenizer, encoder = encoders
    train.export(tmp_path, train.build_pipeline(tokenizer, encoder, vae, parts.build_transformer().eval()))
    settings = json.loads((tmp_path / "recommended.json").read_text())
    pipe = WanPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe.scheduler, UniPCMultistepScheduler)
    assert pipe.transformer.dtype == pipe.vae.dtype == torch.float32
    assert "_name_or_path" not in json.loads((tmp_path / "vae" / "config.json").read_text())
    shown = evaluate.sample(pipe, 2, **{**settings, "num_inference_steps": 2})
    assert shown.shape == (2, 3, data.FRAMES, data.IMAGE_SIZE, data.IMAGE_SIZE)
    assert shown.abs().max() <= 1
    evaluate.sheet(shown, str(tmp_path / "sheet.png"))
    evaluate.gif(shown, str(tmp_path / "clips.gif"))
    assert (tmp_path / "sheet.png").stat().st_size > 1000
    assert (tmp_path / "clips.gif").stat().st_size > 1000


@pytest.mark.host
@pytest.mark.parametrize(("folder", "mebibytes"), [(parts.WEIGHTS, 12), (parts.EXPERTS, 16)], ids=lambda value: str(value)[-7:])
def test_the_trained_models_are_small_and_move_their_digits_the_prompted_way(folder: Path, mebibytes: int):
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert size < mebibytes * 2**20
    assert (folder / "ATTRIBUTION.md").exists()
    settings = json.loads((folder / "recommended.json").read_text())
    assert settings == train.RECOMMENDED
    pipe: Any = WanPipeline.from_pretrained(folder)
    assert (pipe.transformer_2 is not None) == (folder == parts.EXPERTS)
    pipe.set_progress_bar_config(disable=True)
    shown = evaluate.sample(pipe, 2, **{**settings, "num_inference_steps": 4})
    assert shown.shape == (2, 3, data.FRAMES, data.IMAGE_SIZE, data.IMAGE_SIZE)
    left, right = evaluate.motions(shown).tolist()
    assert [data.class_of(seed)[1] for seed in range(2)] == [data.WAYS.index("left"), data.WAYS.index("right")]
    assert left[0] < -7 < 7 < right[0]
    assert max(abs(left[1]), abs(right[1])) < 2


def test_the_judges_know_real_clips():
    _, digits, ways = evaluate.train_judge(copies=1)
    assert digits > 0.9
    assert ways > 0.99
