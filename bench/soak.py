"""Many images in one process: is memory flat, is no state stale, and how often is something compiled?

    python -m bench.soak                    # 200 images, compiled by inductor
    python -m bench.soak --images 40 --eager

Prompts, sizes, batch sizes, step counts and guidance change at random; some images are aborted by an exception, some
interrupted. Every tenth image is the same probe, which must come out as it did the first time.
"""

import argparse
import functools
import gc
import random
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

import afcache
from bench.mini_flux import sampling
from bench.record.clock import seconds_of
from bench.record.figure import new_figure
from bench.record.naming import RESULTS, result_path
from bench.record.recording import write_result
from bench.record.render import table

STEPS, SIZES, BATCHES, SCALES = (3, 8, 14, 20, 28), ((32, 32), (48, 32), (64, 64)), (1, 2, 3), (1.0, 2.0)
PROBE_EVERY = 10


class Task(NamedTuple):
    """What to draw.

    Attributes:
        seed: of the noise; the prompts follow from it.
        steps: denoising steps.
        size: height and width in pixels.
        batch: prompts.
        cfg: true CFG scale; 1 is without guidance.
        aborted_at: step at which an exception ends it, or None.
        interrupted_at: step after which the pipeline is told to stop, or None.

    """

    seed: int
    steps: int = 28
    size: tuple[int, int] = (32, 32)
    batch: int = 1
    cfg: float = 2.0
    aborted_at: int | None = None
    interrupted_at: int | None = None


class AbortedError(Exception):
    """An image that somebody did not wait for."""


PROBE = Task(seed=7)


def random_task(source: random.Random) -> Task:
    """One image; every eighth is aborted, every sixteenth interrupted."""
    steps, fate = source.choice(STEPS), source.random()
    return Task(
        seed=source.randrange(10_000),
        steps=steps,
        size=source.choice(SIZES),
        batch=source.choice(BATCHES),
        cfg=source.choice(SCALES),
        aborted_at=source.randrange(steps) if fate < 1 / 8 else None,
        interrupted_at=source.randrange(steps) if 1 / 8 <= fate < 3 / 16 else None,
    )


def draw(pipe: Any, task: Task) -> np.ndarray | None:
    """The images, or None where the task was aborted."""

    def watch(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        del timestep
        if step == task.aborted_at:
            raise AbortedError
        pipe._interrupt = pipe._interrupt or step == task.interrupted_at
        return tensors

    guided: dict[str, Any] = {"true_cfg_scale": task.cfg, "negative_prompt": [""] * task.batch} if task.cfg > 1 else {}
    height, width = task.size
    options = {**sampling.SETTINGS, "height": height, "width": width, **guided}
    try:
        return pipe(
            [sampling.prompt_of(task.seed + i) for i in range(task.batch)],
            num_inference_steps=task.steps,
            generator=[torch.Generator().manual_seed(task.seed + i) for i in range(task.batch)],
            callback_on_step_end=watch,
            output_type="np",
            **options,
        ).images
    except AbortedError:
        return None


def soak(pipe: Any, images: int, *, probe_every: int = PROBE_EVERY, progress: bool = True) -> list[dict[str, Any]]:
    """Draw, and measure after every image; probes also collect garbage and count live tensors."""
    source, process = random.Random(0), psutil.Process()
    first, pattern, rows = None, "", []
    for index in range(images):
        is_probe = index % probe_every == 0
        task = PROBE if is_probe else random_task(source)
        image, seconds = seconds_of(functools.partial(draw, pipe, task))
        row: dict[str, Any] = {"image": index, **task._asdict(), "is_probe": is_probe, "seconds": seconds}
        if is_probe:
            assert image is not None
            now = afcache.report(pipe).pattern()
            first, pattern = (image, now) if first is None else (first, pattern)
            row |= {"difference": float(np.abs(image - first).max()), "same_decisions": now == pattern, **_live_tensors()}
        row |= {"MiB": process.memory_info().rss / 2**20, "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"]}
        rows.append(row)
        if progress and is_probe:
            print(
                {name: row[name] for name in ("image", "MiB", "graphs", "tensors", "difference", "same_decisions")}, flush=True
            )
    return rows


def _live_tensors() -> dict[str, int]:
    """Tensors that hold memory; a compiler's traces keep others, of symbolic sizes, which hold none."""
    gc.collect()
    traced = (FakeTensor, FunctionalTensor)
    live = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor) and not issubclass(type(each), traced)]
    return {"tensors": len(live), "tensor_bytes": sum(tensor.numel() * tensor.element_size() for tensor in live)}


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Quarters of the run: memory, tensors, graphs, and how probes came out."""
    quarter = len(rows) // 4
    summary = []
    for number in range(4):
        part = rows[number * quarter : (number + 1) * quarter]
        probes = [row for row in part if row["is_probe"]]
        summary.append(
            {
                "images": f"{part[0]['image']} to {part[-1]['image']}",
                "resident memory, median (MiB)": float(np.median([row["MiB"] for row in part])),
                "most (MiB)": max(row["MiB"] for row in part),
                "live tensors at probes": f"{min(r['tensors'] for r in probes)} to {max(r['tensors'] for r in probes)}",
                "MiB in them": max(row["tensor_bytes"] for row in probes) / 2**20,
                "graphs so far": part[-1]["graphs"],
                "probes' largest difference": max(row["difference"] for row in probes),
                "same decisions": "yes" if all(row["same_decisions"] for row in probes) else "no",
            }
        )
    return summary


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Memory and graphs over the images."""
    figure = new_figure(8, 4)
    memory = figure.subplots()
    graphs: Any = memory.twinx()
    images = [row["image"] for row in rows]
    memory.plot(images, [row["MiB"] for row in rows], color="tab:blue", label="resident memory")
    graphs.step(images, [row["graphs"] for row in rows], color="tab:orange", where="post", label="graphs compiled")
    memory.set_xlabel("image")
    memory.set_ylabel("resident memory (MiB)", color="tab:blue")
    memory.set_ylim(bottom=0)
    graphs.set_ylabel("graphs compiled", color="tab:orange")
    graphs.set_ylim(bottom=0)
    memory.set_title("One process, images of changing prompts, sizes, batches, steps and guidance")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Soak and write bench/results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200, help="at least 40 (default 200)")
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args()
    if arguments.images < 4 * PROBE_EVERY:
        parser.error(f"--images must be at least {4 * PROBE_EVERY}, a probe for every quarter, got {arguments.images}")
    pipe = sampling.load()
    afcache.compile_pipeline(pipe, preset="balanced", compile=not arguments.eager, backend=arguments.backend)
    rows = soak(pipe, arguments.images)
    summary = summarise(rows)
    aborted = sum(row["aborted_at"] is not None for row in rows)
    interrupted = sum(row["interrupted_at"] is not None for row in rows)
    notes = [
        f"mini-FLUX, preset balanced, {'eager' if arguments.eager else arguments.backend}; {arguments.images} images in one "
        f"process: 3 to 28 steps, 32 x 32 to 64 x 64 pixels, batches of 1 to 3, with and without guidance; {aborted} "
        f"aborted by an exception, {interrupted} interrupted.",
        "Every tenth image is a probe (28 steps, CFG 2, one prompt); its difference is to the first probe, in pixel values of "
        "0 to 1. Tensors are counted after a garbage collection.",
    ]
    print(table(summary))
    subject = "soak_eager" if arguments.eager else "soak"
    print(write_result(subject, "Soak", rows, notes=notes, folder=arguments.output, shown=summary))
    plot(rows, result_path(subject, ".png", folder=arguments.output))


if __name__ == "__main__":
    main()
