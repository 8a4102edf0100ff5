"""What becomes of the exported step: run back, saved, loaded, compiled just in time and ahead of time, against the eager one.

    python -m bench.export_step

mini-FLUX on a CPU with one thread. What cannot be made is a row that says why. Times are of the processor and not of the
clock, so that other work on the machine counts little; they are medians over the steps of one image, which is the second one
of exported steps.
"""

import argparse
import functools
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch._inductor import config as inductor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

import afcache
from afcache import CacheConfig
from afcache.functional.plans import schedule_steps
from bench.mini_flux import sampling
from bench.record.clock import processor_seconds_of
from bench.record.recording import write_result
from bench.record.render import table

STEPS = 28
BALANCED = afcache.PRESETS["balanced"]
# Name, settings, true CFG scale.
CASES = (
    ("balanced", BALANCED, 1.0),
    ("balanced, guided", BALANCED, 2.0),
    ("4 groups, similarity", afcache.policy("layerwise", groups=4, strategy="similarity"), 1.0),
)

# Takes what an exported step takes.
Step = Callable[..., tuple[Any, Any, Any]]


class Run(NamedTuple):
    """One image: a letter per step, latents and state at its end, milliseconds of every step."""

    pattern: str
    ends: list[torch.Tensor]
    milliseconds: list[float]


def measure(pipe: Any, name: str, config: CacheConfig, cfg: float, folder: Path) -> list[dict[str, Any]]:
    """Rows of one case."""
    problem = sampling.prepare(pipe, [0], steps=STEPS, cfg=cfg)
    program, seconds = processor_seconds_of(lambda: export(pipe.transformer, problem, config), is_brief=False)

    def save() -> Step:
        torch.export.save(program, folder / "step.pt2")
        return torch.export.load(folder / "step.pt2").module()

    def package() -> Step:
        with torch.no_grad():
            path = torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "aoti.pt2"))
        return torch._inductor.aoti_load_package(path)

    def just_in_time() -> Step:
        step: Any = torch.compile(program.module(), fullgraph=True)
        sample(step, program, problem, config)
        return step

    eager = sample_plain(pipe, problem, config, afcache.denoising_step)
    rows = [_row(name, "eager, not exported", eager, eager)]
    made: dict[str, tuple[Callable[[], Step], str]] = {
        "exported": (lambda: program.module(), ""),
        "saved and loaded": (save, "step.pt2"),
        "under torch.compile": (just_in_time, ""),
        "AOTInductor": (package, "aoti.pt2"),
    }
    for label, (make, file) in made.items():
        try:
            step, spent = processor_seconds_of(make, is_brief=False)
            sample(step, program, problem, config)
            run = sample(step, program, problem, config)
        except Exception as error:
            rows.append(_row(name, label, None, eager, says=f"{type(error).__name__}: {str(error).splitlines()[0]}"))
            continue
        rows.append(_row(name, label, run, eager))
        rows[-1]["to make (s)"] = seconds if label == "exported" else spent
        rows[-1]["file (MiB)"] = (folder / file).stat().st_size / 2**20 if file else "-"
    return rows


def export(transformer: Any, problem: sampling.Prepared, config: CacheConfig) -> ExportedProgram:
    """The problem's step."""
    prompt, *others = problem.branches
    return afcache.export_step(transformer, prompt, negative=others[0] if others else None, config=config)


def sample(step: Step, program: ExportedProgram, problem: sampling.Prepared, config: CacheConfig) -> Run:
    """The image of the example that the program holds."""
    assert program.example_inputs is not None
    inputs, latents, states, _, scale = program.example_inputs[0]
    scale = torch.full_like(scale, problem.cfg)
    pattern, milliseconds = "", []
    with torch.no_grad():
        for schedule in schedule_steps(problem.sigmas, config):
            given = {name: value for name, value in schedule._asdict().items() if value is not None}
            arguments = (inputs, latents, states, given, scale)
            (latents, states, records), seconds = processor_seconds_of(functools.partial(step, *arguments), is_brief=True)
            milliseconds.append(1e3 * seconds)
            pattern += "F" if bool(records[0]["is_computed"]) else "."
    return Run(pattern, _tensors((latents, states)), milliseconds)


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def sample_plain(pipe: Any, problem: sampling.Prepared, config: CacheConfig, step: Callable[..., Any]) -> Run:
    """The same image by the functional step."""
    milliseconds = []

    def timed(*args: Any, **static: Any) -> Any:
        result, seconds = processor_seconds_of(lambda: step(*args, **static), is_brief=True)
        milliseconds.append(1e3 * seconds)
        return result

    prompt, *others = problem.branches
    guided = {"negative": others[0], "guidance_scale": problem.cfg} if others else {}
    done = afcache.denoise(pipe.transformer, prompt, problem.sigmas, config=config, step=timed, **guided)
    return Run(done.pattern(), _tensors((done.latents, done.states)), milliseconds)


def _row(case: str, label: str, run: Run | None, eager: Run, *, says: str = "works") -> dict[str, Any]:
    row: dict[str, Any] = {"settings": case, "step": label, "says": says}
    row |= {
        "decisions": "-",
        "largest difference": "-",
        "to make (s)": "-",
        "file (MiB)": "-",
        "computed step (ms)": "-",
        "cached step (ms)": "-",
    }
    if run is None:
        return row
    pairs = list(zip(run.ends, eager.ends, strict=True))
    difference = max(float((ours.double() - theirs.double()).abs().max()) for ours, theirs in pairs if ours.numel())
    is_same = all(torch.equal(ours, theirs) for ours, theirs in pairs)
    row["decisions"] = "eager's" if run.pattern == eager.pattern else run.pattern
    row["largest difference"] = "none" if is_same else difference
    for key, letter in (("computed step (ms)", "F"), ("cached step (ms)", ".")):
        times = [each for each, kind in zip(run.milliseconds, run.pattern, strict=True) if kind == letter]
        row[key] = statistics.median(times) if times else "-"
    return row


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=len(CASES), help="how many of the settings")
    parser.add_argument("--name", default="export", help="subject of the result (default export)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    inductor.compile_threads, inductor.force_disable_caches = 1, True
    pipe = sampling.load()
    rows = []
    for case in CASES[: args.cases]:
        with tempfile.TemporaryDirectory() as folder:
            torch._dynamo.reset()
            rows += measure(pipe, *case, Path(folder))
        print(table(rows), flush=True)
    notes = [
        "mini-FLUX (4 + 8 blocks, 64 tokens), 28 steps of one seed, one thread. The difference is of latents and states",
        "after the last step; none: every bit is the same. Seconds and milliseconds are the processor's, the C++ compiler's",
        "included, without what inductor kept from earlier runs. Below the second row, what is made is made of its program.",
    ]
    write_result(args.name, "The exported step, run back and compiled", rows, notes=notes)


if __name__ == "__main__":
    main()
