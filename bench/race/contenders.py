"""Everything that `compare_compiled` compares, each as its own documentation sets it up, on a fresh pipeline."""

import dataclasses
from functools import partial
from typing import Any

import afcache
from bench.race.contender import Contender, compile_regions, compile_whole, do_nothing
from bench.race.peers import peers
from bench.race.subjects import Task


def contenders() -> list[Contender]:
    """All of them, in the order of tables."""
    return [*_references(), *_fewer_steps(), *_ours(), *peers()]


def _references() -> list[Contender]:
    return [
        Contender("eager", "uncached", "reference", False, do_nothing),
        Contender("compiled", "uncached", "reference", True, do_nothing, partial(compile_whole, fullgraph=True)),
        Contender("compiled by regions", "uncached, regions", "reference", True, do_nothing, compile_regions),
    ]


def _fewer_steps() -> list[Contender]:
    compile_all = partial(compile_whole, fullgraph=True)
    return [
        Contender(f"{share:.0%} of the steps", "fewer steps", "control", True, do_nothing, compile_all, step_share=share)
        for share in (0.5, 0.36, 0.25)
    ]


def _ours() -> list[Contender]:
    def enable(pipe: Any, task: Task, *, settings: dict[str, Any]) -> None:
        del task
        afcache.compile_pipeline(pipe, compile=False, **settings)

    def force(pipe: Any, pattern: str) -> None:
        steps = tuple(index for index, kind in enumerate(pattern) if kind == "F")
        config = dataclasses.replace(afcache.PRESETS["balanced"], policy="planned", refresh_steps=steps)
        afcache.compile_pipeline(pipe, config, compile=False)

    def compile_the_same(pipe: Any, task: Task) -> None:
        config = pipe.transformer._afcache.config
        afcache.restore_pipeline(pipe)
        afcache.compile_pipeline(pipe, config, backend=task.backend)

    def compile_by_regions(pipe: Any, task: Task) -> None:
        config = pipe.transformer._afcache.config
        afcache.restore_pipeline(pipe)
        compile_regions(pipe, task)
        afcache.compile_pipeline(pipe, config, compile="blocks", backend=task.backend)

    choices: dict[str, dict[str, Any]] = {preset: {"preset": preset} for preset in afcache.PRESETS}
    choices |= {f"tolerance {value}": {"tolerance": value} for value in (0.016, 0.032)}
    whole = [
        Contender(
            f"AFCache {name}" + (", compiled" if is_compiled else ""),
            "AFCache",
            "ours",
            is_compiled,
            partial(enable, settings=settings),
            compile_the_same if is_compiled else None,
            force,
        )
        for is_compiled in (False, True)
        for name, settings in choices.items()
    ]
    enable_default = partial(enable, settings=choices["balanced"])
    regions = Contender(
        "AFCache balanced, regions", "AFCache, regions", "ours", True, enable_default, compile_by_regions, force
    )
    return [*whole, regions]
