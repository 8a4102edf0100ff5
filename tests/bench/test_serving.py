"""The rows of `bench.serving`."""

import json
import sys
from pathlib import Path

import pytest
import torch

from bench import serving
from bench.record.naming import result_path

pytestmark = pytest.mark.host


def test_everybody_gets_what_they_asked_for(monkeypatch, tmp_path: Path):
    threads = torch.get_num_threads()
    arguments = ["--requests", "24", "--loads", "1", "--rounds", "1", "--output", str(tmp_path), "--threads", str(threads)]
    monkeypatch.setattr(sys, "argv", ["serving", *arguments])
    serving.main()
    *rows, checked, summary = json.loads(result_path("serving", ".json", folder=tmp_path).read_text())["rows"]
    asked = serving.requests(24, is_troubled=True)
    failing = sum(each.fate == "failing" for each in asked)
    assert failing > 0
    assert checked["failed"] == failing
    assert checked["drawn"] + checked["cancelled"] + failing == 24
    assert (checked["lost"], checked["failed wrongly"]) == (0, 0)
    assert checked["same decisions as alone"] == checked["drawn"]
    assert checked["furthest from alone"] < 1e-3
    assert [row["batcher"] for row in rows] == ["uncached", "AFCache"] * 2
    assert rows[0]["fewer refreshes"] == 1.0 < rows[1]["fewer refreshes"] == pytest.approx(summary["promised"])
