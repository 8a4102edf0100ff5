"""Train mini-Wan and write it as a plain WanPipeline folder.

    python -m bench.mini_wan.train --stage parts                    # text encoder and autoencoder, on a CPU
    python -m bench.mini_wan.train --device cuda --minutes 5        # flow transformer

Three stages, each kept in --work and skipped when it is there already: text encoder, autoencoder, flow transformer. The
last one is resumable: it saves its state every thousand steps.
"""

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel

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


def embed_prompts(tokenizer: Any, encoder: Any) -> torch.Tensor:
    """Encode the empty prompt (row 0) and every wording, class by class: `[1 + 80 * 28, 24, 64]`."""
    with torch.no_grad():
        return text.encode(["", *text.wordings()], tokenizer, encoder)


def build_pipeline(tokenizer: Any, encoder: Any, vae: Any, transformer: Any) -> WanPipeline:
    """Put the parts together."""
    return WanPipeline(tokenizer=tokenizer, text_encoder=encoder, vae=vae, scheduler=build_scheduler(), transformer=transformer)


def export(output: Path, pipe: WanPipeline) -> None:
    """Write diffusers' folder layout: the text encoder in float32, the rest in float16, the attribution and the
    recommended settings.

    transformers loads the dtype that is stored and diffusers float32, so a plain `from_pretrained` is float32 throughout.
    """
    pipe.save_pretrained(output)
    for name, cls in (("vae", AutoencoderKLWan), ("transformer", WanTransformer3DModel)):
        half = cls.from_pretrained(output / name).half()
        half.save_pretrained(output / name)
        config = output / name / "config.json"
        settings = json.loads(config.read_text())
        settings.pop("_name_or_path", None)
        config.write_text(json.dumps(settings, indent=2) + "\n")
    shutil.copy(Path(__file__).parent / "ATTRIBUTION.md", output)
    (output / "recommended.json").write_text(json.dumps(RECOMMENDED, indent=2) + "\n")


def main() -> None:
    """Run the stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("parts", "all"), default="all", help="parts: text encoder and autoencoder only")
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
    torch.set_num_threads(args.threads)
    on_gpu = args.device.startswith("cuda")
    if on_gpu:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    args.work.mkdir(parents=True, exist_ok=True)
    tokenizer, encoder = text.load_or_train(args.work / "text", steps=args.text_steps, seed=SEED)
    vae = autoencoder.load_or_train(
        args.work / "vae", steps=args.vae_steps, minutes=args.vae_minutes, seed=SEED, device=args.device, batch=args.vae_batch
    )
    if args.stage == "parts":
        return
    started = time.monotonic()
    pool = Pool(vae, size=args.pool, chunk=args.chunk, seed=SEED + 3, device=args.device)
    print(
        f"{len(pool.latents)} clips encoded, latents' deviation {float(pool.latents.std()):.3f}, "
        f"{time.monotonic() - started:.1f} s",
        flush=True,
    )
    trainer = FlowTrainer(
        pool,
        embed_prompts(tokenizer, encoder),
        steps=args.steps if args.minutes is None else None,
        lr=args.lr,
        batch=args.batch,
        renew_every=args.renew_every or (20 if args.minutes is None else None),
        device=args.device,
        low_precision=on_gpu and not args.precise,
        seed=SEED,
    )
    state = args.state or args.work / "flow.pt"
    if state.exists():
        trainer.restore(torch.load(state, map_location="cpu", weights_only=True))
    if args.compile:
        torch._dynamo.config.suppress_errors = True
        trainer.transformer.compile_repeated_blocks()
    deadline = None if args.minutes is None else started + 60 * args.minutes
    train(trainer, deadline=deadline, save=lambda: torch.save(trainer.state(), state))
    export(args.output, build_pipeline(tokenizer, encoder, vae.cpu(), trainer.average.cpu()))
    print(f"wrote {args.output}, {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
