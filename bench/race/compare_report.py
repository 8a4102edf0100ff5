"""What `compare_compiled` measured of a contender, in rows and in words."""

import statistics
from typing import Any

import numpy as np

import afcache
from bench.race.contender_process import pattern_of
from bench.race.equal_quality import mode_of
from bench.race.subjects import Task, image_tokens
from bench.race.turns import Race
from bench.record.spread import spread_of


def heading(task: Task, images: int) -> str:
    """One line: what was measured."""
    size = "" if task.resolution is None else f", {task.resolution} pixels"
    return f"{task.model}, {task.steps} steps{size}, {task.dtype}, {images} images on {task.device}"


def row(race: Race, task: Task) -> dict[str, Any]:
    """Everything measured of one contender, for the JSON; None where there is nothing."""
    contender = race.contender
    facts: dict[str, Any] = {
        "contender": contender.name,
        "family": contender.family,
        "kind": contender.kind,
        "is_compiled": contender.is_compiled,
        "failure": race.failure,
    }
    if race.failure is not None or race.ready is None or not race.drawn:
        return facts
    seeds = list(race.drawn)
    evaluations = [race.ready.evaluations.get(seed, next(iter(race.ready.evaluations.values()))) for seed in seeds]
    promised = [task.steps / sum(shares) for shares in evaluations]
    against = {name: [race.rivals[name][seed] for seed in seeds] for name in race.rivals}
    mine = [race.drawn[seed] for seed in seeds]
    same_mode = against[mode_of(facts)]
    gains = {name: [a.seconds / b.seconds for a, b in zip(rival, mine, strict=True)] for name, rival in against.items()}
    alone = [sum(a.step_seconds) / sum(b.step_seconds) for a, b in zip(same_mode, mine, strict=True)]
    facts |= {
        "seconds": statistics.median(image.seconds for image in mine),
        "seconds_spread": _ends([image.seconds for image in mine]),
        "transformer_seconds": statistics.median(sum(image.step_seconds) for image in mine),
        "rest_share": statistics.median(1 - sum(image.step_seconds) / image.seconds for image in mine),
        **{f"speedup_over_{name}": statistics.median(gain) for name, gain in gains.items()},
        **{f"speedup_over_{name}_spread": _ends(gain) for name, gain in gains.items()},
        "transformer_speedup": statistics.median(alone),
        "fewer_block_evaluations": task.steps * len(evaluations) / sum(map(sum, evaluations)),
        "efficiency": statistics.median(gain / promise for gain, promise in zip(gains[mode_of(facts)], promised, strict=True)),
        "transformer_efficiency": statistics.median(gain / promise for gain, promise in zip(alone, promised, strict=True)),
        "first_call_seconds": race.ready.first_call,
        "graphs": race.ready.graphs,
        "graph_breaks": race.ready.graph_breaks,
        "hit_recompile_limit": race.finished.hit_limit if race.finished else None,
        "recompiled_graphs": race.finished.recompiled_graphs if race.finished else None,
        "peak_mib": race.finished.peak_mib if race.finished else None,
        "pattern": pattern_of(evaluations[0]),
        **_step_kinds(evaluations, [image.step_seconds for image in mine]),
    }
    if not task.is_random:
        facts |= _quality([image.pixels for image in mine], [image.pixels for image in against["eager"]])
    return facts


def _ends(values: list[float]) -> list[float]:
    """Around the median, which has a key of its own."""
    low, _, high = spread_of(values)
    return [low, high]


def _step_kinds(evaluations: list[list[float]], seconds: list[list[float]]) -> dict[str, Any]:
    """Median seconds of a step whose blocks all ran, and of the others; how many there are in an image."""
    kinds: dict[bool, list[float]] = {True: [], False: []}
    for shares, times in zip(evaluations, seconds, strict=True):
        for share, time in zip(shares, times, strict=True):
            kinds[share > 0.99].append(time)
    return {
        "refresh_seconds": statistics.median(kinds[True]) if kinds[True] else None,
        "cached_seconds": statistics.median(kinds[False]) if kinds[False] else None,
        "refreshes": len(kinds[True]) / len(evaluations),
        "cached_steps": len(kinds[False]) / len(evaluations),
        **_shares(evaluations, seconds),
    }


def _shares(evaluations: list[list[float]], seconds: list[list[float]]) -> dict[str, float]:
    """Seconds of an image by kind of step, medians over images. The first two steps stand apart: guards are checked there."""
    pairs = [list(zip(shares, times, strict=True)) for shares, times in zip(evaluations, seconds, strict=True)]
    return {
        "first_two_seconds": statistics.median(sum(time for _, time in image[:2]) for image in pairs),
        "later_refreshes_seconds": statistics.median(sum(t for share, t in image[2:] if share > 0.99) for image in pairs),
        "later_cached_seconds": statistics.median(sum(t for share, t in image[2:] if share <= 0.99) for image in pairs),
    }


def _quality(images: list[np.ndarray], references: list[np.ndarray]) -> dict[str, Any]:
    psnr = [min(afcache.psnr(a, b), 150.0) for a, b in zip(images, references, strict=True)]
    facts: dict[str, Any] = {"psnr": statistics.mean(psnr), "psnr_worst": min(psnr)}
    if images[0].ndim == 4:
        clips = [afcache.clip_quality(a, b) for a, b in zip(images, references, strict=True)]
        facts["ssim"] = statistics.mean(clip.ssim for clip in clips)
        facts["psnr_worst_frame"] = min(min(clip.worst_frame, 150.0) for clip in clips)
        facts["flicker"] = statistics.mean(clip.flicker for clip in clips)
        return facts
    facts["ssim"] = statistics.mean(afcache.ssim(a, b) for a, b in zip(images, references, strict=True))
    if (distance := _lpips()) is not None:
        facts["lpips"] = statistics.mean(distance(a, b) for a, b in zip(images, references, strict=True))
    return facts


def _lpips() -> Any:
    """The learned distance, if its package and its weights are there."""
    try:
        import lpips  # pyright: ignore[reportMissingImports]
        import torch

        network = lpips.LPIPS(net="alex", verbose=False)
    except Exception:
        return None

    def distance(image: np.ndarray, reference: np.ndarray) -> float:
        pair = [torch.from_numpy(x).permute(2, 0, 1)[None].float() * 2 - 1 for x in (image, reference)]
        return float(network(*pair))

    return distance


def shown(facts: dict[str, Any]) -> dict[str, str]:
    """A row of the readable table."""
    if "seconds" not in facts:
        shown_row = dict.fromkeys(_COLUMNS, "")
        return {**shown_row, "contender": facts["contender"], "seconds": f"failed: {facts['failure']}"}
    shown_row = {title: show(facts) for title, show in _COLUMNS.items()}
    if "flicker" in facts:
        shown_row |= {"worst frame": _decibels(facts["psnr_worst_frame"]), "flicker": f"{facts['flicker']:.4f}"}
    return shown_row


def _graphs(facts: dict[str, Any]) -> str:
    later = f", {facts['recompiled_graphs']} later" if facts["recompiled_graphs"] else ""
    later += ", limit hit" if facts["hit_recompile_limit"] else ""
    return f"{facts['graphs']} ({facts['graph_breaks']} breaks{later})" if facts["is_compiled"] else "-"


def _optional(facts: dict[str, Any], key: str, format_: str) -> str:
    return format(facts[key], format_) if facts.get(key) is not None else "-"


def _decibels(psnr: float | None) -> str:
    """Rounding of float32 alone gives well over 100 dB."""
    return "-" if psnr is None else f"{psnr:.1f}" if psnr < 100 else "> 100"


def _faster(facts: dict[str, Any], reference: str) -> str:
    low, high = facts[f"speedup_over_{reference}_spread"]
    return f"{facts[f'speedup_over_{reference}']:.2f}x ({low:.2f} to {high:.2f})"


_COLUMNS: dict[str, Any] = {
    "contender": lambda f: f["contender"],
    "seconds": lambda f: f"{f['seconds']:.3f} ({f['seconds_spread'][0]:.3f} to {f['seconds_spread'][1]:.3f})",
    "over eager": lambda f: _faster(f, "eager"),
    "over compiled": lambda f: _faster(f, "compiled"),
    "fewer blocks": lambda f: f"{f['fewer_block_evaluations']:.2f}x",
    "efficiency": lambda f: f"{f['efficiency']:.2f}",
    "of the transformer": lambda f: f"{f['transformer_efficiency']:.2f}",
    "PSNR": lambda f: _decibels(f.get("psnr")),
    "worst": lambda f: _decibels(f.get("psnr_worst")),
    "SSIM": lambda f: _optional(f, "ssim", ".4f"),
    "LPIPS": lambda f: _optional(f, "lpips", ".4f"),
    "first call (s)": lambda f: f"{f['first_call_seconds']:.1f}",
    "graphs": _graphs,
    "peak MiB": lambda f: _optional(f, "peak_mib", ".0f"),
}


_OF_VIDEOS = (
    "An image is a clip: PSNR is that of all its frames, SSIM their mean; flicker is what changes from frame to frame and "
    "should not, relative to what moves, the mean of all clips; the worst frame is that of all clips.",
)


def notes(task: Task, images: int, *, is_quick: bool) -> list[str]:
    """What a reader of the table must know."""
    lines = [
        f"{images} images per contender, seeds 3000 and up, each in a process of its own, in turns with the uncached pipeline "
        "(eager and compiled), which lives through the whole run. Speed-ups are medians over the images of (time of the "
        "uncached image taken in the same turn / time), seconds those of the whole pipeline; in brackets "
        + ("quartiles." if images > 4 else "the lowest and the highest."),
        "Efficiency: speed-up over the uncached pipeline of the same mode (compiled, or eager) divided by what the saved block "
        "evaluations promise; beside it the same of the transformer alone. Block evaluations are counted by hooks in an eager "
        "run; a block's attentions and its MLP count the same.",
        "First call: one image with a cold compiler"
        + (", two contenders at a time." if is_quick else ".")
        + " Graphs: those that Dynamo made for it, its graph breaks, and graphs made later.",
    ]
    if task.is_random:
        told = {name for name in task.patterns or {} if name}
        return [
            *lines,
            f"{task.random.shape}; {image_tokens(task)} image tokens.",
            "Random weights and forced refreshes: what steps cost, never quality."
            + (" Contenders refresh as on one image of a trained model, seed 3000." if told else ""),
        ]
    return [
        *lines,
        "PSNR (float64) and SSIM against the uncached, eager image of the same seed.",
        *(_OF_VIDEOS if task.model == "mini-wan" else ()),
        f"MagCache's ratios are of its own calibration mode: {[round(ratio, 4) for ratio in task.mag_ratios]}.",
    ]
