"""The tables of README and docs/ of compare_compiled on CPUs and of full_size --fake, made of bench/results: run it, and paste.

python -m bench.record.readme_tables
"""

import json
from typing import Any

from bench.race.equal_quality import mode_of, quality_rows, shown_quality, speed_of
from bench.record.naming import newest_result
from bench.record.render import table


def main() -> None:
    """Print the tables: equal quality, costs on a larger model, beside forced refreshes; FLUX.1-dev's steps and messages."""
    names = ("mini", "random_medium", "random_small", "random_qwen_image_small", "random_wan_small")
    mini, medium, small, qwen_image, wan = (_rows(name) for name in names)
    print(table([shown_quality(row) for row in quality_rows(mini)]))
    print()
    print(table([{**_cost(facts, facts["contender"]), "PSNR on mini-FLUX": _quality(facts)} for facts in _by_quality(medium)]))
    print()
    print(table([_cost(facts, facts["family"]) for facts in _by_efficiency(small)]))
    for rows in (qwen_image, wan):
        print()
        print(table([_cost(facts, facts["contender"]) for facts in _by_efficiency(rows)]))
    shapes = json.loads(newest_result("full_size_fake_flux1", kind=None).read_text())["rows"]
    print()
    print(table([_step(facts) for facts in shapes if "TFLOP" in facts]))
    print()
    print(table([_messages(facts) for facts in shapes if "ranks" in facts]))


def _rows(subject: str) -> list[dict[str, Any]]:
    stored = json.loads(newest_result(f"compare_{subject}").read_text())
    return [facts for facts in stored["rows"] if "seconds" in facts]


def _by_quality(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    cached = [facts for facts in rows if facts["kind"] != "reference"]
    return sorted(cached, key=lambda facts: -facts.get("psnr_with_these_decisions", 0.0))


def _by_efficiency(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    caches = [facts for facts in rows if facts["kind"] in ("ours", "peer")]
    return sorted(caches, key=lambda facts: (mode_of(facts), -facts["efficiency"]))


def _cost(facts: dict[str, Any], name: str) -> dict[str, str]:
    spread = facts.get(f"speedup_over_{mode_of(facts)}_spread")
    return {
        "": f"`{name.removesuffix(', compiled')}`",
        "mode": mode_of(facts),
        "over the uncached pipeline": f"{speed_of(facts):.2f}x" + (f" ({spread[0]:.2f} to {spread[1]:.2f})" if spread else ""),
        "fewer blocks": f"{facts['fewer_block_evaluations']:.2f}x",
        "efficiency": f"{facts['efficiency']:.2f}",
        "graphs": f"{facts['graphs']}, {facts['graph_breaks'] or 'no'} breaks" if facts["is_compiled"] else "-",
    }


def _step(facts: dict[str, Any]) -> dict[str, str]:
    return {
        "": facts["step"],
        "TFLOP": f"{facts['TFLOP']:.4g}",
        "of a refresh": f"{facts['% of a refresh']:.3g} %",
        "reads": f"{facts['MiB read']:.1f} MiB",
        "writes": f"{facts['MiB written']:.1f} MiB",
        **{f"{device}, at least": f"{facts[f'{device}, at least (ms)']:.3f} ms" for device in ("H200", "H100")},
    }


def _messages(facts: dict[str, Any]) -> dict[str, str]:
    return {
        "ranks": str(facts["ranks"]),
        "": facts["step"],
        "collectives": str(facts["collectives"]),
        "sent by a rank": f"{facts['MiB sent by a rank']:.2f} MiB",
    }


def _quality(facts: dict[str, Any]) -> str:
    mean, worst = (facts.get(f"psnr{suffix}_with_these_decisions") for suffix in ("", "_worst"))
    return "-" if mean is None else f"{mean:.1f} dB, worst {worst:.1f} dB"


if __name__ == "__main__":
    main()
