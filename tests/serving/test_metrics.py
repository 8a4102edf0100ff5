"""What a batcher has done, as text."""

import sys
import types
from typing import Any

import pytest

from afcache.serving.metrics import prometheus_text


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
