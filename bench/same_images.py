"""Whether a change of the code changes what is drawn: decisions and images of fixed seeds, to the last bit.

    python -m bench.same_images --write before.json     # in a checkout of the state before
    python -m bench.same_images --against before.json   # after the change, on the same machine

Every row is one image: its pattern of decisions, and checksums of its latents and of its pixels. Bits differ between machines
and numbers of threads; so one thread computes, and the file says nothing elsewhere.
"""

import argparse
import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

import afcache

SEEDS = 8
_STEPS = 28


def draw_all(seeds: int) -> dict[str, dict[str, str]]:
    """Pattern and checksums of every image, by what was asked for."""
    torch.set_num_threads(1)
    pipe = afcache.load_mini_flux()
    pipe.set_progress_bar_config(disable=True)
    rows: dict[str, dict[str, str]] = {}
    for backend, cfg in itertools.product(("eager", "aot_eager"), (1.0, 2.0)):
        afcache.compile_pipeline(pipe, compile=backend != "eager", backend="aot_eager")
        for seed in range(seeds):
            latents = _draw(pipe, seed, cfg, "latent")
            pattern = afcache.report(pipe).pattern()
            image = _draw(pipe, seed, cfg, "np")
            row = {"pattern": pattern, "latents": _checksum(latents), "image": _checksum(image)}
            rows[f"{backend}, CFG {cfg:g}, seed {seed}"] = row
        afcache.restore_pipeline(pipe)
    return rows


def _draw(pipe: Any, seed: int, cfg: float, output_type: str) -> np.ndarray:
    options: dict[str, Any] = {"true_cfg_scale": cfg, "negative_prompt": ""} if cfg > 1 else {}
    prompt = f"a handwritten {('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven')[seed % 8]} on a flower"
    generator = torch.Generator().manual_seed(seed)
    options.update(num_inference_steps=_STEPS, max_sequence_length=16, generator=generator, output_type=output_type)
    return np.asarray(pipe(prompt, **options).images[0])


def _checksum(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()[:16]


def main() -> None:
    """Write the rows, or compare with those of a file; exit with 1 where one differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--write", type=Path, metavar="FILE")
    how.add_argument("--against", type=Path, metavar="FILE")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"images of each kind (default {SEEDS})")
    arguments = parser.parse_args()
    rows = draw_all(arguments.seeds)
    if arguments.write:
        arguments.write.write_text(json.dumps(rows, indent=2) + "\n")
        print(f"{len(rows)} images written to {arguments.write}")
        return
    before = json.loads(arguments.against.read_text())
    different = [name for name in rows if rows[name] != before.get(name)]
    for name in different:
        print(f"{name}: {before.get(name)} before, {rows[name]} now")
    print(f"{len(rows) - len(different)} of {len(rows)} images are the same to the last bit, decisions included")
    if different:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
