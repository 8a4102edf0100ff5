"""What a batcher has done, in numbers and as text."""

import sys
import types
from typing import Any

import pytest

from afcache.serving.batcher import Batcher
from afcache.serving.metrics import prometheus_text
from tests.serving.test_batcher import arguments


def test_metrics_as_text_need_the_client_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ImportError, match="pip install prometheus_client"):
        prometheus_text({"steps": 3.0})
    gauges: dict[str, Any] = {}
    client = types.SimpleNamespace(
        CollectorRegistry=dict,
        Gauge=lambda name, words, registry: types.SimpleNamespace(set=lambda value: gauges.update({name: value})),
        generate_latest=lambda registry: b"text",
    )
    monkeypatch.setitem(sys.modules, "prometheus_client", client)
    assert prometheus_text({"steps": 3.0}) == "text"
    assert gauges == {"afcache_steps": 3.0}


@pytest.mark.host
def test_who_has_an_image_finds_its_calls_counted(pipe, monkeypatch):
    arrive, found = Batcher._arrive, []

    def look(batcher: Batcher, arrived: Any) -> None:
        arrive(batcher, arrived)
        found.append(batcher._metrics.samples)

    monkeypatch.setattr(Batcher, "_arrive", look)
    with Batcher(pipe) as batcher:
        handle = batcher.submit(**arguments(0))
    assert found == [handle.result().pattern.count("F")]
