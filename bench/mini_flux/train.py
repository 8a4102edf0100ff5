"""Train a small FLUX model and write it as a plain FluxPipeline folder.

    python -m bench.mini_flux.train --steps 4000 --output afcache/assets/mini_flux
    python -m bench.mini_flux.train --recipe strokes --device cuda --batch 128 --minutes 4

Three stages, each kept in --work and skipped when it is there already: text encoders (on the CPU), autoencoder and flow
transformer (on --device). The last one is resumable: it saves its whole state every few hundred steps.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from torch import Tensor

from afcache._typing import HostModule
from bench.mini_flux import text
from bench.mini_flux.flow import FlowTrainer, Fresh, Pool
from bench.mini_flux.parts import build_scheduler
from bench.mini_flux.recipe import MINI_FLUX, RECIPES, Recipe
from bench.mini_flux.vae import load_or_train_vae

SEED = 0
_RUNS = Path("bench/mini_flux/runs")
_POOL = 50_000
# Until the pace is known.
_ENDLESS = 10**9


class Deadline:
    """Sets the number of steps so that the schedule ends in time, and mends it when the pace changes.

    Args:
        trainer: whose `steps` is set: from 50 steps once warmed up, and every 500 steps anew.
        at: `time.monotonic()` when the last step should be done.

    """

    _WARM, _MEASURED, _EVERY = 20, 50, 500

    def __init__(self, trainer: FlowTrainer, at: float) -> None:
        self._trainer, self._at = trainer, at
        self._first = trainer.step_index
        self._mark: tuple[int, float] | None = None

    def after_step(self, loss: Tensor) -> None:
        """Look at the clock where it is due."""
        step = self._trainer.step_index
        done = step - self._first
        if done not in (self._WARM, self._WARM + self._MEASURED) and done % self._EVERY:
            return
        loss.item()  # Waits for the device.
        now = time.monotonic()
        if self._mark:
            pace = (now - self._mark[1]) / (step - self._mark[0])
            self._trainer.steps = step + max(0, int((self._at - now) / pace))
            print(f"step {step}: {1000 * pace:.1f} ms a step, {self._trainer.steps} steps in all", flush=True)
        self._mark = step, now


def embed_prompts(recipe: Recipe, encoders: tuple) -> tuple[Tensor, Tensor]:
    """Encode the empty prompt (row 0) and every wording, class by class."""
    prompts = [""] + [wording for values in recipe.classes for wording in recipe.wordings(*values)]
    with torch.no_grad():
        return text.encode(prompts, *encoders)


def export(recipe: Recipe, output: Path, encoders: tuple, vae: HostModule, transformer: HostModule) -> None:
    """Write diffusers' folder layout: text encoders in float32, the rest in float16, and the recommended settings.

    transformers loads the dtype that is stored and diffusers float32, so a plain `from_pretrained` is float32 throughout.
    """
    clip_tokenizer, clip, t5_tokenizer, t5 = encoders
    pipe = FluxPipeline(
        scheduler=build_scheduler(),
        vae=vae.cpu(),
        text_encoder=clip,
        tokenizer=clip_tokenizer,
        text_encoder_2=t5,
        tokenizer_2=t5_tokenizer,
        transformer=transformer.cpu(),
    )
    pipe.save_pretrained(output)
    for name, cls in (("vae", AutoencoderKL), ("transformer", FluxTransformer2DModel)):
        cls.from_pretrained(output / name, dtype=torch.float16).save_pretrained(output / name)
        config = output / name / "config.json"
        settings = json.loads(config.read_text())
        settings.pop("_name_or_path", None)
        config.write_text(json.dumps(settings, indent=2) + "\n")
    size = recipe.image_size
    recommended = {
        "height": size,
        "width": size,
        "max_sequence_length": recipe.text_length,
        "true_cfg_scale": recipe.guidance,
    }
    (output / "recommended.json").write_text(json.dumps(recommended, indent=2) + "\n")


def train_flow(trainer: FlowTrainer, checkpoint: Path, *, save_every: int, ends_at: float | None) -> None:
    """Train to the end of the schedule, from the checkpoint if there is one."""
    started = time.monotonic()
    if checkpoint.exists():
        trainer.restore(torch.load(checkpoint, weights_only=True, map_location="cpu"))
    deadline = Deadline(trainer, ends_at) if ends_at else None
    losses: list[Tensor] = []
    while trainer.step_index < trainer.steps:
        losses.append(trainer.step())
        if deadline:
            deadline.after_step(losses[-1])
        if trainer.step_index % 100 == 0:
            mean = torch.stack(losses).mean().item()
            losses.clear()
            print(f"step {trainer.step_index} loss {mean:.4f} after {time.monotonic() - started:.0f} s", flush=True)
        if trainer.step_index % save_every == 0 or trainer.step_index >= trainer.steps:
            torch.save(trainer.state(), checkpoint)


def main() -> None:
    """Run the stages."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=RECIPES, default=MINI_FLUX.name)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, default=6000, help="flow steps")
    length.add_argument("--minutes", type=float, help="until the flow stage ends, from the start of this command")
    parser.add_argument("--batch", type=int, default=32, help="of the flow stage")
    parser.add_argument("--device", default="cpu", help="of autoencoder and flow stage")
    parser.add_argument("--pool", type=int, help="train on so many images encoded once; 0: new ones, as on the CPU")
    parser.add_argument("--vae-steps", type=int, default=3000)
    parser.add_argument("--vae-batch", type=int, default=32)
    parser.add_argument("--text-steps", type=int, default=400)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, help="default: bench/mini_flux/runs, and a folder in it but for mini-FLUX")
    parser.add_argument("--output", type=Path, help="default: where the recipe's trained weights are")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    recipe, device = RECIPES[args.recipe], torch.device(args.device)
    on_cpu = device.type == "cpu"
    if not on_cpu:
        torch.set_float32_matmul_precision("high")
    work = args.work or (_RUNS if recipe is MINI_FLUX else _RUNS / recipe.name)
    work.mkdir(parents=True, exist_ok=True)
    encoders = text.load_or_train_encoders(recipe, work / "text", steps=args.text_steps, seed=SEED)
    vae = load_or_train_vae(recipe, work / "vae", steps=args.vae_steps, batch=args.vae_batch, seed=SEED, device=device)
    size = args.pool if args.pool is not None else (0 if on_cpu else _POOL)
    if size:
        latents = Pool(recipe, vae, size, seed=SEED + 3, device=device)
    else:
        latents = Fresh(recipe.source(device), vae, seed=SEED + 3)
    trainer = FlowTrainer(
        recipe,
        latents,
        embed_prompts(recipe, encoders),
        steps=_ENDLESS if args.minutes else args.steps,
        lr=args.lr,
        batch=args.batch,
        seed=SEED,
        device=device,
    )
    print(f"{recipe.name}: {sum(p.numel() for p in trainer.transformer.parameters()):,} parameters", flush=True)
    ends_at = began + 60 * args.minutes if args.minutes else None
    train_flow(trainer, work / "flow.pt", save_every=500 if on_cpu else 2000, ends_at=ends_at)
    export(recipe, args.output or recipe.folder, encoders, vae, trainer.average)
    print(f"written after {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
