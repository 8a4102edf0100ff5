"""The command line under torchrun: who does what, and what it says when that cannot be."""

import sys
from typing import Any

import pytest
import torch

from afcache.cli import processes
from afcache.cli.main import main
from afcache.parallel.config import ParallelConfig

CPU = torch.device("cpu")


def choose_degrees(**changes: Any) -> ParallelConfig | None:
    open_degrees: dict[str, Any] = {"ulysses": None, "ring": None, "cfg": None, "heads": 24, "is_guided": False, "device": CPU}
    return processes.choose_degrees(**{**open_degrees, **changes})


def degrees(parallel: ParallelConfig | None) -> tuple[int, int, int]:
    assert parallel is not None
    return parallel.ulysses_degree, parallel.ring_degree, parallel.cfg_degree


def test_one_process_shares_nothing(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert choose_degrees() is None
    assert choose_degrees(ulysses=1) is None
    assert processes.is_first()


@pytest.mark.parametrize(
    ("count", "given", "expected"),
    [
        (2, {}, (2, 1, 1)),
        (2, {"is_guided": True}, (1, 1, 2)),
        (8, {"is_guided": True}, (4, 1, 2)),
        (2, {"heads": 3}, (1, 2, 1)),
        (4, {"heads": 6}, (2, 2, 1)),
        (4, {"ring": 2}, (2, 2, 1)),
        (4, {"ulysses": 1, "is_guided": True}, (1, 2, 2)),
        (4, {"cfg": 1, "is_guided": True}, (4, 1, 1)),
        (4, {"ulysses": 2, "ring": 1, "cfg": 2, "is_guided": True}, (2, 1, 2)),
    ],
)
def test_degrees_that_are_not_given_are_chosen(monkeypatch, count: int, given: dict[str, Any], expected: tuple[int, ...]):
    monkeypatch.setenv("WORLD_SIZE", str(count))
    parallel = choose_degrees(**given)
    assert degrees(parallel) == expected
    assert parallel is not None
    assert parallel.backend == "gloo"


@pytest.mark.parametrize(
    ("count", "given", "message"),
    [
        (
            1,
            {"ulysses": 2},
            r"--ulysses 2: the product .* processes, 1, got 2\. Start 2 with torchrun --nproc-per-node 2 -m af",
        ),
        (3, {"ulysses": 2}, r"--ulysses 2: the product of the degrees must be the number of processes, 3, got 2"),
        (4, {"ulysses": 2, "ring": 1, "cfg": 1}, r"--ulysses 2 --ring 1 --cfg-parallel 1: the product .* 4, got 2"),
        (2, {"ulysses": 2, "heads": 3}, r"--ulysses must divide the model's attention heads, 3, got 2; --ring needs"),
        (2, {"cfg": 2}, r"--cfg-parallel 2 shares two guidance branches; give --true-cfg-scale above 1"),
    ],
)
def test_degrees_that_cannot_be_are_refused(monkeypatch, count: int, given: dict[str, Any], message: str):
    monkeypatch.setenv("WORLD_SIZE", str(count))
    monkeypatch.setattr(sys, "argv", ["afcache", "generate"])
    with pytest.raises(ValueError, match=message):
        choose_degrees(**given)


def test_one_gpu_is_not_for_all_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"--device 'cuda:0' is one GPU for 2 processes\. Use --device cuda"):
        processes.own_device("cuda:0", torch.device("cuda", 0))
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="more processes on this machine than it has GPUs, 1"):
        processes.own_device("cuda", torch.device("cuda"))
    assert processes.own_device("cpu", CPU) == CPU


def test_what_is_wrong_everywhere_is_said_once(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        assert main(["generate", "--no-compile", "--no-cache"]) == 2
        assert capsys.readouterr().err.count("--policy none shares the work") == lines


def test_what_is_wrong_in_one_process_names_it(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")

    def explode(*_: object) -> None:
        raise RuntimeError("rank 1 of 2 lost another rank")

    monkeypatch.setattr("afcache.cli.generate.run", explode)
    assert main(["generate"]) == 2
    assert "afcache: error (rank 1): RuntimeError: rank 1 of 2 lost another rank (AFCACHE_DEBUG=1" in capsys.readouterr().err
