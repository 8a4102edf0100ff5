"""A trained flow as a model of other processes: the same images by other ways, and the cache holds on them."""

import pytest

from afcache.calibration.metrics import psnr
from afcache.settings.presets import tuned
from bench.compare_processes import SCHEDULERS, Plain, evaluate
from bench.mini_flux import sampling

pytestmark = pytest.mark.host
SEEDS, STEPS = range(16000, 16002), 20


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_flows_images_are_drawn_by_another_process(name: str):
    flow = sampling.load()
    pipe = Plain(flow, SCHEDULERS[name](), SEEDS, 2.0)
    images = pipe(STEPS)
    straight = [sampling.draw(flow, seed, steps=STEPS, cfg=2.0) for seed in SEEDS]
    assert all(psnr(image, expected) > 18 for image, expected in zip(images, straight, strict=True))
    # Another seed's are other images.
    assert psnr(images[0], straight[1]) < 14
    point = evaluate(pipe, tuned(0.012, target="noise"), images, STEPS)
    assert point.speed > 1.5
    assert point.worst > 30
