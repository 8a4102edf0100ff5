"""Files of trajectories: what is not written, and what is not read."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import afcache
from afcache import Denoised
from bench.mini_flux.sampling import prepare
from tests.support.sampling import RESIDUAL

pytestmark = pytest.mark.host
FORMAT = "afcache checkpoint 3"


@pytest.fixture
def half(pipe) -> Denoised:
    """A trajectory of three steps done."""
    problem = prepare(pipe, [0], steps=6)
    return afcache.denoise(pipe.transformer, problem.branches[0], problem.sigmas, config=RESIDUAL, stop=3)


def test_what_is_no_trajectory_is_not_written(half: Denoised, tmp_path: Path):
    others: list[Any] = [half.states, half.states[0], half._asdict()]
    for other in others:
        with pytest.raises(TypeError, match="trajectory must be what denoise returned, got"):
            afcache.save_checkpoint(other, tmp_path / "other")
        assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("part", "kind", "said"),
    [
        ({"latents": [1.0]}, TypeError, r"trajectory\.latents must be a tensor, got \[1\.0\]\. Keep a state of your"),
        ({"states": None}, TypeError, r"trajectory\.states must be a tuple of CacheState, got None"),
        ({"records": [None]}, TypeError, r"trajectory\.records must be a list of tuples of StepRecord, got \[None\]"),
        ({"origin": "mine"}, TypeError, r"trajectory\.origin must be an Origin, or None, got 'mine'"),
        ({"target": "image"}, ValueError, r"trajectory\.target must be one of 'residual', 'velocity', 'noise', got 'image'"),
    ],
)
def test_a_trajectory_with_parts_of_another_kind_is_not_written(half: Denoised, tmp_path: Path, part: Any, kind: Any, said):
    with pytest.raises(kind, match=said):
        afcache.save_checkpoint(half._replace(**part), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_folder_that_does_not_exist_is_named(half: Denoised, tmp_path: Path):
    for path in (tmp_path / "none" / "half", tmp_path):
        with pytest.raises(OSError, match=r"path must be a file in a folder that exists, got '.*'\. Make the folder first"):
            afcache.save_checkpoint(half, path)
    with pytest.raises(OSError, match=r"path must be a file that afcache\.save_checkpoint wrote, got the folder"):
        afcache.load_checkpoint(tmp_path)


def written(half: Denoised, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of its file."""
    afcache.save_checkpoint(half, path)
    with safe_open(path, framework="pt") as file:
        return load_file(path), dict(file.metadata())


def test_files_that_lack_a_part_are_refused(half: Denoised, tmp_path: Path):
    tensors, metadata = written(half, tmp_path / "half")
    records = [name for name in tensors if name.startswith("records.1.")]
    for lost in (["latents"], ["states.0.history"], records):
        kept = {name: tensor for name, tensor in tensors.items() if name not in lost}
        assert len(kept) < len(tensors)
        save_file(kept, tmp_path / "other", metadata=metadata)
        with pytest.raises(ValueError, match=r"other does not hold the parts of a trajectory: .* writes all of them"):
            afcache.load_checkpoint(tmp_path / "other")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("colours", r"\['colours'\], which no trajectory has"),
        ("target", r"\['target'\], which no trajectory has"),
        ("states.0.colours", "unexpected keyword argument 'colours'"),
        ("states.0.gate.reference", "missing 2 required positional arguments: 'accumulated' and 'num_cached'"),
        ("states.0.history.first", "is a tensor and holds others|is below a tensor"),
        ("latents.first", "is a tensor and holds others|is below a tensor"),
        ("states.5.history", r"entries must be numbered from 0, got \['0', '5'\]"),
        ("states.first.history", r"entries must be numbered from 0, got \['0', 'first'\]"),
        ("records.0", "entries must be numbered from 0, got a tensor|is a tensor and holds others|is below a tensor"),
    ],
)
def test_files_with_parts_that_no_trajectory_has_are_refused(half: Denoised, tmp_path: Path, name: str, said: str):
    tensors, metadata = written(half, tmp_path / "half")
    save_file({**tensors, name: torch.ones(1)}, tmp_path / "other", metadata=metadata)
    with pytest.raises(ValueError, match=said):
        afcache.load_checkpoint(tmp_path / "other")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"target": "image"}, r"trajectory\.target must be one of 'residual', 'velocity', 'noise', got 'image'"),
        ({"origin": "{"}, "does not hold the parts of a trajectory: Expecting property name"),
        ({"origin": '{"colour": 1}'}, "unexpected keyword argument 'colour'"),
        ({"format": "afcache checkpoint 2"}, f"must have the format '{FORMAT}', got 'afcache checkpoint 2'.* compute them"),
    ],
)
def test_files_whose_metadata_is_another_are_refused(half: Denoised, tmp_path: Path, changes: dict[str, str], said: str):
    tensors, metadata = written(half, tmp_path / "half")
    save_file(tensors, tmp_path / "other", metadata={**metadata, **changes})
    with pytest.raises(ValueError, match=said):
        afcache.load_checkpoint(tmp_path / "other")


def test_files_that_are_no_checkpoint_are_refused(tmp_path: Path):
    (tmp_path / "text").write_text("nothing of the kind")
    with pytest.raises(ValueError, match="text is no safetensors file, or a damaged one"):
        afcache.load_checkpoint(tmp_path / "text")
    save_file({"latents": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match=f"other must have the format '{FORMAT}', got None"):
        afcache.load_checkpoint(tmp_path / "other")
    with pytest.raises(OSError, match="none"):
        afcache.load_checkpoint(tmp_path / "none")


def test_a_trajectory_made_by_hand_says_nothing_of_its_origin(half: Denoised, tmp_path: Path):
    own = Denoised(half.latents, half.states, half.records, half.target)
    afcache.save_checkpoint(own, tmp_path / "own")
    assert own.origin is afcache.load_checkpoint(tmp_path / "own").origin is None
