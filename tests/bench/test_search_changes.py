"""Changes of the presets, compared at equal quality."""

import math

import numpy as np
import pytest

import afcache
from afcache.settings.presets import for_videos
from bench.search.curves import Point
from bench.search_changes import CHANGES, PRESETS, SUBJECTS, Drawn, Subject, changed, compared, draw, is_none, uncached

IMAGES = Subject("images", "mini-flux", 4, 1.0, range(2), (0.01,), (45, 40))
VIDEOS = SUBJECTS[-1]._replace(name="videos")


def curve(*points: tuple[float, float], flicker: float = math.nan) -> Drawn:
    return Drawn([Point(speed, (psnr, psnr)) for speed, psnr in points], [flicker] * len(points))


def test_changes_are_ranked_by_speed_at_equal_quality():
    drawn = {
        ("images", PRESETS): curve((2.0, 50.0), (4.0, 30.0)),
        ("videos", PRESETS): curve((2.0, 45.0), (4.0, 25.0), flicker=0.1),
        ("images", "faster"): curve((4.0, 50.0), (8.0, 30.0)),
        ("videos", "faster"): curve((2.0, 45.0), (4.0, 25.0), flicker=0.2),
    }
    first, second = compared((IMAGES, VIDEOS), drawn)
    assert (first["change"], second["change"]) == ("faster", PRESETS)
    assert first["images"] == pytest.approx(2.0)
    assert first["videos"] == pytest.approx(1.0)
    assert (first["flicker, 35 dB"], second["flicker, 35 dB"]) == (0.2, 0.1)


def test_every_change_is_one_of_the_presets_of_its_subject():
    assert changed(IMAGES, PRESETS, 0.01) == afcache.PRESETS["balanced"]
    assert changed(VIDEOS, PRESETS, 0.01) == for_videos(afcache.PRESETS["balanced"])
    for subject, own in ((IMAGES, ("warmup_steps 2", "error_weight 0.5")), (VIDEOS, ("warmup_steps 3", "error_weight 0"))):
        configs = {name: str(changed(subject, name, 0.01).to_dict()) for name in CHANGES}
        assert {configs.pop(name) for name in own} == {configs[PRESETS]}
        assert [name for name in CHANGES if is_none(subject, name)] == [name for name in CHANGES if name in (PRESETS, *own)]
        assert len(set(configs.values())) == len(configs)


@pytest.mark.host
def test_images_are_drawn_and_counted(monkeypatch):
    monkeypatch.setitem(CHANGES, "no cache", {"policy": "none"})
    expected = uncached(IMAGES)
    assert [image.shape for image in expected] == [(32, 32, 3)] * 2
    assert not np.allclose(expected[0], expected[1])
    (point,), (flicker,) = draw((IMAGES, "no cache", expected))
    assert (point.speed, point.worst) == (1.0, 150.0)
    assert math.isnan(flicker)
