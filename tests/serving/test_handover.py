"""A request goes on in another batcher where its checkpoint left it."""

import dataclasses
import time
from typing import Any

import pytest
import torch

import afcache
from afcache.sampling.checkpoint import save_checkpoint
from afcache.serving.batcher import Batcher
from afcache.serving.checkpoint import read_request, write_request
from afcache.serving.engine import Engine
from afcache.serving.intake import depart
from tests.serving.test_batcher import PATIENT, arguments
from tests.support.sampling import largest_difference

pytestmark = pytest.mark.host
CONFIG = afcache.PRESETS["balanced"]


def half_way(pipe: Any, number: int, *, ticks: int, config: afcache.CacheConfig = CONFIG, **changes: Any) -> tuple[bytes, str]:
    """A request's checkpoint after so many ticks, and what its steps did."""
    engine = Engine(pipe.transformer, config=config, max_batch=4)
    engine.admit(number, depart(pipe, arguments(number, **changes)), config)
    for _ in range(ticks):
        engine.tick()
    data = engine.checkpoint(number)
    assert data is not None
    return data, engine.progress(number).pattern


@pytest.mark.parametrize("ticks", [0, 1, 4])
@pytest.mark.parametrize(("number", "changes"), [(0, {}), (1, {"true_cfg_scale": 2.3})], ids=["one branch", "guided"])
def test_another_batcher_goes_on_bit_by_bit(pipe, number: int, changes: dict[str, Any], ticks: int):
    with Batcher(pipe, config=CONFIG) as batcher:
        expected = batcher.submit(**arguments(number, **changes)).result(PATIENT)
    data, done = half_way(pipe, number, ticks=ticks, **changes)
    with Batcher(pipe, config=CONFIG) as batcher:
        resumed = batcher.submit(start=data, **arguments(number, **changes)).result(PATIENT)
        metrics = batcher.metrics()
    assert resumed.pattern == expected.pattern
    assert resumed.pattern.startswith(done)
    assert torch.equal(resumed.image, expected.image)
    # What was computed before was not computed again.
    assert metrics["batch_fill"] * batcher._max_batch * batcher._metrics.calls == expected.pattern[len(done) :].count("F")


def test_checkpoints_are_taken_while_it_draws(pipe):
    asked = arguments(0, num_inference_steps=60)
    with Batcher(pipe, tolerance=0.0) as batcher:
        handle = batcher.submit(**asked)
        kept = []
        while not handle.done():
            if (data := handle.checkpoint()) is not None:
                kept.append((data, handle.progress()))
            time.sleep(0.01)
        expected = handle.result()
        assert handle.checkpoint() is None
    assert len(kept) > 3
    places = [len(read_request(data).standing.pattern) for data, _ in kept]
    assert places == sorted(places)
    assert all(place <= progress.done for place, (_, progress) in zip(places, kept, strict=True))
    with Batcher(pipe, tolerance=0.0) as batcher:
        resumed = batcher.submit(start=kept[len(kept) // 2][0], **asked).result(PATIENT)
    assert largest_difference(resumed.image.numpy(), expected.image.numpy()) < 1e-5


@pytest.mark.parametrize(("pattern", "due"), [("F" * 9, 9), ("F" * 3, 2), ("F" * 3, 10)])
def test_a_place_that_no_request_can_be_at_is_refused(pipe, pattern: str, due: int):
    """Nobody would ever be due there, and nobody would ever have the image."""
    kept = read_request(half_way(pipe, 0, ticks=1)[0])
    standing = kept.standing._replace(pattern=pattern, due=due)
    wrong = write_request(standing, target=kept.target, origin=kept.origin, noise=kept.noise)
    with Batcher(pipe, config=CONFIG) as batcher:
        handle = batcher.submit(start=wrong, **arguments(0))
        with pytest.raises(ValueError, match="must have some of its 9 steps before it"):
            handle.result(PATIENT)


REFUSED = [
    ({"prompt": "a handwritten nine on a flower"}, {}, "inputs must be what start was computed with"),
    ({"num_inference_steps": 10}, {}, "sigmas must be what start was computed over"),
    ({"true_cfg_scale": 2.0, "negative_prompt": ""}, {}, "a state for each guidance branch, 2, got 1"),
    ({"generator": torch.Generator().manual_seed(7)}, {}, "must have begun with the latents of this request"),
    ({}, {"config": dataclasses.replace(CONFIG, warmup_steps=3)}, "warmup_steps=3"),
]


@pytest.mark.parametrize(("changes", "settings", "message"), REFUSED, ids=["prompt", "steps", "guidance", "seed", "settings"])
def test_a_checkpoint_of_another_request_is_refused(pipe, changes: dict[str, Any], settings: dict[str, Any], message: str):
    data, _ = half_way(pipe, 0, ticks=2)
    with Batcher(pipe, **{"config": CONFIG, **settings}) as batcher:
        handle = batcher.submit(start=data, **arguments(0, **changes))
        with pytest.raises(ValueError, match=message):
            handle.result(PATIENT)
        # Nobody else is hurt.
        assert batcher.submit(**arguments(0)).result(PATIENT).pattern


def test_another_tolerance_holds_from_the_next_step_on(pipe):
    kept, done = read_request(half_way(pipe, 0, ticks=3)[0]), "FFF."
    assert kept.standing.pattern == done
    # As within a tick, where the next step is to be forecast.
    standing = kept.standing._replace(due=6)
    data = write_request(standing, target=kept.target, origin=kept.origin, noise=kept.noise)
    with Batcher(pipe, config=CONFIG) as batcher:
        assert batcher.submit(start=data, **arguments(0)).result(PATIENT).pattern.startswith("FFF...")
    with Batcher(pipe, config=CONFIG) as batcher:
        resumed = batcher.submit(start=data, tolerance=0.0, **arguments(0)).result(PATIENT)
    assert resumed.pattern == done + "F" * (9 - len(done))


def test_a_damaged_checkpoint_is_refused(pipe):
    data, _ = half_way(pipe, 0, ticks=2)
    assert read_request(data).standing.pattern
    for place in (len(data) // 2, len(data) - 3):
        with pytest.raises(ValueError, match="not those that were written"):
            read_request(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    with pytest.raises(ValueError, match="of this version and whole"):
        read_request(data.replace(b'"origin":"{', b'"origin":"[', 1))


def test_what_is_no_checkpoint_is_refused_at_once(pipe, tmp_path):
    data, _ = half_way(pipe, 0, ticks=1)
    trajectory = afcache.Denoised(torch.zeros(1, 4, 4), (), [], "velocity")
    save_checkpoint(trajectory, tmp_path / "other.safetensors")
    with Batcher(pipe, config=CONFIG) as batcher:
        for wrong in (data[: len(data) // 2], b"", (tmp_path / "other.safetensors").read_bytes()):
            with pytest.raises(ValueError, match=r"start must be the bytes of Handle.checkpoint\(\)"):
                batcher.submit(start=wrong, **arguments(0))
        not_bytes: Any = "path"
        with pytest.raises(TypeError, match="got str"):
            batcher.submit(start=not_bytes, **arguments(0))
