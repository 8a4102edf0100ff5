"""FLUX.1-dev at its real size by its shapes, and the measurement on a device, proven on a small one."""

import inspect
import json
import subprocess
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeGuard

import diffusers
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from afcache.settings.presets import DEFAULT_TARGET, preset_config
from bench import full_size
from bench.full_size import facts_of
from bench.models.random_flux import SIZES
from bench.models.real_sizes import REAL_SIZES
from bench.record.naming import result_path
from bench.scale import full_size_gpu
from bench.scale.captured_step import capture_real, cost_of
from bench.scale.full_size_gpu import Bench
from bench.scale.full_size_subject import parse_shape
from bench.scale.full_size_tables import UNFINISHED
from bench.scale.step_costs import by_kind, gain

ROOT = Path(__file__).parent.parent.parent
DIM, CHANNELS, TOKENS, IMAGE, BLOCKS = 3072, 64, 4096 + 512, 4096, 19 + 38


def rows_of(folder: Path, subject: str, device: str | None = "cpu") -> list[dict[str, Any]]:
    return json.loads(result_path(subject, ".json", device=device, folder=folder).read_text())["rows"]


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["full_size", *arguments])
    full_size.main()


def test_flux1_at_its_real_size_is_one_graph_of_one_decision(monkeypatch, tmp_path: Path, capsys):
    run_main(monkeypatch, "--fake", "--output", str(tmp_path))
    refresh, cached, facts, *messages, h200, h100 = rows_of(tmp_path, "full_size_fake_flux1", None)
    assert (facts["graphs"], facts["graph breaks"], facts["decisions"]) == (1, 0, 1)
    # Attention and MLP of both kinds of blocks are 24 dim^2 FLOPs a token; attention between tokens, 4 seq^2 dim a block.
    by_hand = BLOCKS * (24 * TOKENS * DIM**2 + 4 * TOKENS**2 * DIM)
    assert refresh["TFLOP"] * 1e12 == pytest.approx(by_hand, rel=2e-3)
    # Nothing of the model runs.
    assert cached["TFLOP"] == 0
    # Two velocities in float32, and the latents that the last step led to.
    history = 2 * IMAGE * CHANNELS * 4 / 2**20
    trail = history / 2
    assert facts["state (MiB)"] == pytest.approx(history + trail, rel=1e-2)
    # The state is read and returned, beside latents and velocity.
    latents = IMAGE * CHANNELS * 2 / 2**20
    assert cached["MiB written"] == pytest.approx(history + trail + latents, rel=1e-2)
    assert cached["MiB read"] == pytest.approx(history + trail + latents, rel=1e-2)
    # 11.9 billion parameters; a refresh reads all, and the history.
    assert facts["weights (GiB)"] == pytest.approx(11.9e9 * 2 / 2**30, rel=1e-2)
    assert refresh["MiB read"] == pytest.approx(1024 * facts["weights (GiB)"] + history, rel=1e-2)
    assert (h200["TB/s"], h200["TFLOP/s"], h100["TB/s"], h100["TFLOP/s"]) == (4.3, 780, 3.35, 989)
    # A refresh waits for its products, a cached step for its bytes.
    assert refresh["H200, at least (ms)"] == pytest.approx(1e3 * refresh["TFLOP"] / 780)
    assert cached["H200, at least (ms)"] == pytest.approx(1e3 * (cached["MiB read"] + cached["MiB written"]) * 2**20 / 4.3e12)
    assert cached["H100, at least (ms)"] == pytest.approx(cached["H200, at least (ms)"] * 4.3 / 3.35)
    assert [(row["ranks"], row["step"]) for row in messages] == [(n, k) for n in (2, 4, 8) for k in ("refresh", "cached step")]
    for row in messages:
        ranks = row["ranks"]
        if row["step"] == "cached step":
            assert (row["collectives"], row["MiB sent by a rank"]) == (0, 0)
            continue
        # Each rank sends its velocity to all others, and within a block three shares of its tokens' width, and one back.
        velocity = (ranks - 1) * IMAGE // ranks * CHANNELS * 2
        exchanged = 4 * TOKENS // ranks * DIM * 2 * (ranks - 1) // ranks * BLOCKS
        # Errors and decisions are small.
        assert 2 * BLOCKS + 1 <= row["collectives"] <= 2 * BLOCKS + 3
        assert row["MiB sent by a rank"] * 2**20 == pytest.approx(velocity + exchanged, rel=1e-4)
    assert "FLUX.1-dev, a step by its shapes" in (tmp_path / "full_size_fake_flux1.md").read_text()
    assert capsys.readouterr().out


def test_a_residuals_step_embeds_and_projects(monkeypatch, tmp_path: Path):
    run_main(monkeypatch, "--fake", "--size", "tiny", "--target", "residual", "--output", str(tmp_path))
    _, cached, facts, *messages, _, _ = rows_of(tmp_path, "full_size_fake_residual_tiny", None)
    size = SIZES["tiny"]
    # Embedding, head, and what makes the conditioning out of time, guidance and pooled text.
    by_hand = 2 * size.tokens * size.dim * 2 * CHANNELS + 2 * size.dim * (2 * 256 + 768 + 3 * size.dim + 2 * size.dim)
    assert cached["TFLOP"] * 1e12 == pytest.approx(by_hand, rel=1e-2)
    # Two residuals in bfloat16, and in float32 the latents that the last step led to.
    kept = 2 + CHANNELS * 4 / (size.dim * 2)
    assert kept <= facts["state (image tokens)"] <= kept + 0.1
    assert [row["collectives"] for row in messages if row["step"] == "cached step"] == [1, 1, 1]


def test_it_starts_as_a_file_from_anywhere(tmp_path: Path):
    command = [sys.executable, str(ROOT / "bench/full_size.py"), "--fake", "--size", "tiny", "--output", str(tmp_path)]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    refresh, cached, facts, *_ = rows_of(tmp_path, "full_size_fake_tiny", None)
    assert facts["decisions"] == 1
    assert cached["TFLOP"] < refresh["TFLOP"]


def test_without_a_gpu_it_says_what_can_be_run(monkeypatch, capsys):
    monkeypatch.setattr(full_size.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        run_main(monkeypatch, "--gpu")
    assert "torch finds no GPU here. Use --device cpu --size tiny" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["1024", "1000x1", "0x1", "512x0", "ax1"])
def test_shapes_that_cannot_be_are_refused(text: str):
    with pytest.raises(ArgumentTypeError, match=r"is no PIXELSxBATCH with a side that 16 divides"):
        parse_shape(text)


SMALL = ["--gpu", "--size", "tiny", "--device", "cpu", "--backend", "eager", "--steps", "8", "--rounds", "1"]


@pytest.mark.host
def test_the_measurement_runs_from_end_to_end(monkeypatch, tmp_path: Path, capsys):
    asked = ["--contenders", "plain", "regional", "step", "variants", "ahead"]
    run_main(monkeypatch, *SMALL, "--output", str(tmp_path), *asked, "--shapes", "96x2", "--modes", "reduce-overhead")
    steps = rows_of(tmp_path, "full_size_tiny_steps")
    assert [(row["contender"], row["decisions"], row["note"]) for row in steps] == [
        ("plain, compiled", "-", ""),
        ("plain, regional", "-", ""),
        ("AFCache", "forced, every 4", ""),
        ("AFCache", "live", ""),
        ("AFCache", "ahead", ""),
    ]
    forced, live, ahead = steps[2:]
    assert forced["pattern"] == "FF...F.."
    assert forced["promised"] == pytest.approx(8 / 3)
    assert live["pattern"] == ahead["pattern"]
    assert all(row["MiB over plain"] == "not measured" for row in steps[2:])
    # One decision, and two checks of the timestep that accelerators do without.
    assert forced["waits of a step"].startswith("3 ")
    variants = rows_of(tmp_path, "full_size_tiny_variants")
    assert [(row["pixels"], row["batch"], row["mode"], row["decisions"], row["note"]) for row in variants] == [
        (64, 1, "-", "-", ""),
        (96, 2, "-", "-", ""),
        (64, 1, "default", "forced", ""),
        (64, 1, "default", "live", ""),
        (64, 1, "default", "ahead", ""),
        (96, 2, "default", "forced", ""),
        (64, 1, "reduce-overhead", "forced", ""),
    ]
    assert all(row["cached / plain (%)"] > 0 for row in variants if row["decisions"] == "forced")
    forward, compiled, yardstick = rows_of(tmp_path, "full_size_tiny_equality")
    assert forward["relative L2"] < 1e-2
    assert compiled["relative L2"] < max(1e-2, 2 * yardstick["relative L2"])
    assert UNFINISHED not in "".join(path.read_text() for path in tmp_path.iterdir())
    printed = capsys.readouterr().out
    assert all(f"{{'ours': '{row['ours']}'" in printed for row in (forward, compiled, yardstick))


@pytest.mark.host
def test_another_target_and_few_contenders_have_tables_of_their_own(monkeypatch, tmp_path: Path):
    asked = ["--target", "velocity", "--contenders", "regional", "blocks"]
    run_main(monkeypatch, *SMALL, "--output", str(tmp_path), *asked)
    plain, forced, live = rows_of(tmp_path, "full_size_tiny_velocity_steps")
    assert [row["contender"] for row in (plain, forced, live)] == ["plain, regional", "AFCache, blocks", "AFCache, blocks"]
    assert (forced["pattern"], forced["note"], live["note"]) == ("FF...F..", "", "")
    assert {path.name.split("_cpu_")[0] for path in tmp_path.iterdir()} == {"full_size_tiny_velocity_steps"}
    assert 'Target "velocity".' in next(tmp_path.glob("*_steps_*.md")).read_text()


class Ended(BaseException):
    """What ends a run without being an error of a measurement, as a signal is."""


def answer(monkeypatch: pytest.MonkeyPatch, calls: list[str], *, ends_at: str = "") -> None:
    """Measure nothing, and note in which order what would be."""

    def stand_in(name: str, row: dict[str, Any]) -> Callable[..., Iterator[dict[str, Any]]]:
        def rows(bench: Bench, *given: Any, ahead: bool = False, around: str = "step") -> Iterator[dict[str, Any]]:
            mode = given[0].mode if name == "variant_rows" else None
            calls.append(mode or ("ahead" if ahead else name))
            yield row
            if calls[-1] == ends_at:
                raise Ended

        return rows

    for name in ("equal_forward", "plain_rows", "regional_rows", "cached_rows", "shape_seconds", "variant_rows"):
        monkeypatch.setattr(Bench, name, stand_in(name, {"note": f"from {name}"}))


def test_a_run_that_is_ended_leaves_what_it_had_measured(monkeypatch, tmp_path: Path):
    answer(monkeypatch, [], ends_at="cached_rows")
    with pytest.raises(Ended):
        run_main(monkeypatch, *SMALL, "--output", str(tmp_path))
    assert [row["note"] for row in rows_of(tmp_path, "full_size_tiny_equality")] == ["from equal_forward"]
    notes = [row["note"] for row in rows_of(tmp_path, "full_size_tiny_steps")]
    assert notes == ["from plain_rows", "from regional_rows", "from cached_rows"]
    files = [(f"full_size_tiny_{name}", suffix) for name in ("equality", "steps") for suffix in (".json", ".md")]
    written = {result_path(subject, suffix, folder=tmp_path) for subject, suffix in files}
    assert set(tmp_path.iterdir()) == written
    assert all(UNFINISHED in path.read_text() for path in written)


def test_modes_that_autotune_come_last_and_need_the_time_for_it(monkeypatch, tmp_path: Path):
    answer(monkeypatch, calls := [])
    modes = ["--modes", "max-autotune-no-cudagraphs", "reduce-overhead"]
    run_main(monkeypatch, *SMALL, "--output", str(tmp_path), "--shapes", *modes)
    assert calls[-3:] == ["reduce-overhead", "ahead", "max-autotune-no-cudagraphs"]
    monkeypatch.setattr(full_size_gpu, "_SECONDS_TO_TUNE", {"cpu": 1e6})
    run_main(monkeypatch, *SMALL, "--output", str(tmp_path), "--shapes", *modes)
    quick, tuned = rows_of(tmp_path, "full_size_tiny_variants")[-2:]
    assert (quick["mode"], quick["note"]) == ("reduce-overhead", "from variant_rows")
    assert (tuned["mode"], tuned["note"][-22:]) == ("max-autotune-no-cudagraphs", "about 1000000 s needed")


def test_what_does_not_fit_into_the_time_is_named(monkeypatch, tmp_path: Path):
    run_main(monkeypatch, *SMALL, "--output", str(tmp_path), "--minutes", "-1", "--shapes", "--modes")
    for name in ("steps", "variants", "equality"):
        rows = rows_of(tmp_path, f"full_size_tiny_{name}")
        assert rows
        assert all(row["note"].startswith("not measured: 0 s of the time budget left") for row in rows)


def test_a_measurement_that_fails_is_named(tmp_path: Path):
    where = {"device": "cpu", "size": "tiny", "output": tmp_path, "target": DEFAULT_TARGET}
    bench = Bench(Namespace(**where, minutes=1.0, steps=8, rounds=1, backend="eager"))

    def fail():
        yield {"pattern": "F."}
        raise RuntimeError("out of memory\nand more")

    bench.attempt("steps", {"contender": "one", "pattern": "-", "note": ""}, 0.0, fail)
    measured, failed = rows_of(tmp_path, "full_size_tiny_steps")
    assert measured == {"contender": "one", "pattern": "F.", "note": ""}
    assert failed == {"contender": "one", "pattern": "-", "note": "failed: RuntimeError: out of memory"}


def test_gains_are_made_of_medians():
    refreshes, reused = by_kind([9.0, 10.0, 1.0, 1.0, 11.0, 10.0, 1.0, 3.0], "FF..")
    assert (refreshes, reused) == ([9.0, 10.0, 11.0, 10.0], [1.0, 1.0, 1.0, 3.0])
    assert gain([10.0, 10.0], refreshes, reused) == pytest.approx({"speed-up": 80 / 44, "promised": 2, "efficiency": 40 / 44})
    assert gain([10.0], [10.0], []) == {"speed-up": 1, "promised": 1, "efficiency": 1}


@pytest.mark.parametrize("name", REAL_SIZES)
def test_other_families_have_one_graph_that_computes_what_their_models_do(name: str):
    """At their real widths and lengths, with one block of each kind."""
    few = dict.fromkeys(("num_layers", "num_single_layers", "num_refiner_layers"), 1)
    parameters = inspect.signature(getattr(diffusers, REAL_SIZES[name].transformer)).parameters
    blocks = sum(count in parameters for count in ("num_layers", "num_single_layers"))
    size = REAL_SIZES[name]._replace(settings={key: one for key, one in few.items() if key in parameters}, blocks=blocks)
    step = capture_real(size, preset_config("balanced", target="noise"))
    facts = facts_of(step)
    assert (facts["graphs"], facts["graph breaks"], facts["decisions"]) == (1, 0, 1)
    with FakeTensorMode(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        size.make()(**size.arguments())
    attention = sum(count for op, count in counter.get_flop_counts()["Global"].items() if "attention" in str(op))
    refresh = cost_of(step, size.attention_flops, takes_refresh=True)
    assert refresh.flops - size.attention_flops == pytest.approx(counter.get_total_flops() - attention, rel=1e-6)
    # Two of noise and the latents, in float32, are read and returned, beside latents and velocity.
    values = size.arguments()["hidden_states"].numel()
    cached = cost_of(step, size.attention_flops, takes_refresh=False)
    assert cached.flops == 0
    assert cached.read == pytest.approx(values * (3 * 4 + 2), rel=1e-2)
    assert cached.written == pytest.approx(cached.read, rel=1e-2)
    # A token is as wide as the first block's own.
    assert any(module.weight.shape == (size.dim, size.dim) for module in step.transformer.modules() if is_linear(module))


def is_linear(module: torch.nn.Module) -> TypeGuard[torch.nn.Linear]:
    return isinstance(module, torch.nn.Linear)


def test_other_families_are_counted_alone(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_main(monkeypatch, "--gpu", "--size", "qwen_image")
    assert "--size qwen_image goes with --fake alone" in capsys.readouterr().err
