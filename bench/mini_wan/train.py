"""Train mini-Wan and write it as a plain WanPipeline folder.

    python -m bench.mini_wan.train --stage parts                    # text encoder and autoencoder, on a CPU
    python -m bench.mini_wan.train --device cuda --minutes 5        # flow transformer
    python -m bench.mini_wan.train --start afcache/assets/mini_wan --experts --output bench/mini_wan/experts

Three stages, each kept in --work and skipped when it is there already: text encoder, autoencoder, flow transformer. The
last one is resumable: it saves its state every thousand steps. With --start a trained model goes on learning; --experts
makes two of its transformer, as Wan 2.2 has them: one for the noise levels from 0.875 on, the other for those below.
"""

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from torch import Tensor

from bench.mini_wan import autoencoder, data, text
from bench.mini_wan.flow import FlowTrainer, Pool, train
from bench.mini_wan.parts import WEIGHTS, build_scheduler

SEED = 0
RECOMMENDED = {
    "height": data.IMAGE_SIZE,
    "width": data.IMAGE_SIZE,
    "num_frames": data.FRAMES,
    "max_sequence_length": text.TEXT_LENGTH,
    "guidance_scale": 5.0,
    "num_inference_steps": 28,
}

# Where Wan 2.2 changes over from one expert to the other, and what each learns, the one for high noise first.
BOUNDARY = 0.875
EXPERTS = {"high": (BOUNDARY, 1.0), "low": (0.0, BOUNDARY)}


class Parts(NamedTuple):
    """What a pipeline is made of: `transformer` holds the weights that training starts from, if not at random ones."""

    tokenizer: Any
    encoder: Any
    vae: Any
    transformer: dict[str, Tensor] | None = None


def embed_prompts(tokenizer: Any, encoder: Any) -> torch.Tensor:
    """Encode the empty prompt (row 0) and every wording, class by class: `[1 + 80 * 28, 24, 64]`."""
    with torch.no_grad():
        return text.encode(["", *text.wordings()], tokenizer, encoder)


def build_pipeline(tokenizer: Any, encoder: Any, vae: Any, transformer: Any, second: Any = None) -> WanPipeline:
    """Put the parts together; with a second transformer as Wan 2.2 does."""
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=vae,
        scheduler=build_scheduler(),
        transformer=transformer,
        transformer_2=second,
        boundary_ratio=None if second is None else BOUNDARY,
    )


def export(output: Path, pipe: WanPipeline) -> None:
    """Write diffusers' folder layout: the text encoder in float32, the rest in float16, the attribution and the
    recommended settings.

    transformers loads the dtype that is stored and diffusers float32, so a plain `from_pretrained` is float32 throughout.
    """
    pipe.save_pretrained(output)
    classes = {"vae": AutoencoderKLWan, "transformer": WanTransformer3DModel, "transformer_2": WanTransformer3DModel}
    for name, cls in classes.items():
        if not (output / name).exists():
            continue
        half = cls.from_pretrained(output / name).half()
        half.save_pretrained(output / name)
        config = output / name / "config.json"
        settings = json.loads(config.read_text())
        settings.pop("_name_or_path", None)
        config.write_text(json.dumps(settings, indent=2) + "\n")
    shutil.copy(Path(__file__).parent / "ATTRIBUTION.md", output)
    (output / "recommended.json").write_text(json.dumps(RECOMMENDED, indent=2) + "\n")


def load_parts(args: argparse.Namespace) -> Parts:
    """Those of the model to start from, or trained ones."""
    if args.start:
        pipe: Any = WanPipeline.from_pretrained(args.start)
        encoder, vae = (part.eval().requires_grad_(False) for part in (pipe.text_encoder, pipe.vae))
        return Parts(pipe.tokenizer, encoder, vae.to(args.device), pipe.transformer.state_dict())
    tokenizer, encoder = text.load_or_train(args.work / "text", steps=args.text_steps, seed=SEED)
    vae = autoencoder.load_or_train(
        args.work / "vae", steps=args.vae_steps, minutes=args.vae_minutes, seed=SEED, device=args.device, batch=args.vae_batch
    )
    return Parts(tokenizer, encoder, vae)


def learn(args: argparse.Namespace, pool: Pool, parts: Parts, expert: str | None, deadline: float | None) -> Any:
    """Train one transformer, or go on where its state in --work was saved; return the average of its weights."""
    trainer = FlowTrainer(
        pool,
        embed_prompts(parts.tokenizer, parts.encoder),
        steps=args.steps if deadline is None else None,
        lr=args.lr,
        batch=args.batch,
        renew_every=args.renew_every or (20 if deadline is None else None),
        device=args.device,
        low_precision=args.device.startswith("cuda") and not args.precise,
        noise_levels=EXPERTS[expert] if expert else (0.0, 1.0),
        start=parts.transformer,
        seed=SEED,
    )
    state = args.state or args.work / f"flow{'_' + expert if expert else ''}.pt"
    if state.exists():
        trainer.restore(torch.load(state, map_location="cpu", weights_only=True))
    if args.compile:
        torch._dynamo.config.suppress_errors = True
        trainer.transformer.compile_repeated_blocks()
    train(trainer, deadline=deadline, save=lambda: torch.save(trainer.state(), state))
    return trainer.average.cpu()


def main() -> None:
    """Run the stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("parts", "all"), default="all", help="parts: text encoder and autoencoder only")
    parser.add_argument("--start", type=Path, metavar="FOLDER", help="a trained model that goes on learning")
    parser.add_argument("--experts", action="store_true", help="two transformers out of --start's, for high and low noise")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--minutes", type=float, help="length of the flow stage, its pool and timing included")
    parser.add_argument("--steps", type=int, default=8000, help="flow steps, where --minutes is not given")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--pool", type=int, default=16384, help="clips whose latents are kept")
    parser.add_argument("--chunk", type=int, default=256, help="clips rendered and encoded together")
    parser.add_argument("--renew-every", type=int, help="steps between fresh chunks (default: 20; a tenth of --minutes)")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--precise", action="store_true", help="no bfloat16 (a CPU never uses it)")
    parser.add_argument("--compile", action="store_true", help="compile the blocks")
    parser.add_argument("--text-steps", type=int, default=400)
    parser.add_argument("--vae-steps", type=int, default=2800)
    parser.add_argument("--vae-minutes", type=float, help="instead of --vae-steps")
    parser.add_argument("--vae-batch", type=int, default=1, help="times two to four clips a step")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("bench/mini_wan/runs"))
    parser.add_argument("--state", type=Path, help="the flow stage's state (default: flow.pt in --work)")
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    if args.experts and (args.start is None or args.state):
        parser.error("--experts begins at a trained model, and keeps a state for each: give --start FOLDER, and no --state.")
    torch.set_num_threads(args.threads)
    if args.device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    args.work.mkdir(parents=True, exist_ok=True)
    parts = load_parts(args)
    if args.stage == "parts":
        return
    started = time.monotonic()
    pool = Pool(parts.vae, size=args.pool, chunk=args.chunk, seed=SEED + 3, device=args.device)
    print(
        f"{len(pool.latents)} clips encoded, latents' deviation {float(pool.latents.std()):.3f}, "
        f"{time.monotonic() - started:.1f} s",
        flush=True,
    )
    experts = [*EXPERTS] if args.experts else [None]
    share = None if args.minutes is None else 60 * args.minutes / len(experts)
    transformers = [
        learn(args, pool, parts, expert, None if share is None else started + share * count)
        for count, expert in enumerate(experts, start=1)
    ]
    export(args.output, build_pipeline(parts.tokenizer, parts.encoder, parts.vae.cpu(), *transformers))
    print(f"wrote {args.output}, {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
