"""`afcache info --model`: what the configs of a pipeline tell."""

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import afcache
from afcache.cli.main import main
from afcache.cli.model import Model
from afcache.cli.outline import _TEXT_IS_ENOUGH, Outline, check_text_alone, outline
from afcache.models.families import KNOWN
from bench.mini_wan.parts import EXPERTS
from tests.cli.test_cli import fail
from tests.cli.test_families import WAN
from tests.support.zoo import hunyuan_video, ltx2, qwen_image, sana, wan

SPRINT = next(kind for kind in sana.KINDS if "Sprint" in kind.name)
PIPELINES = [name for known in KNOWN for name in known.pipelines]
# What the names of pipelines tell that change a picture, or are led by one, or by the number of a class.
CHANGES = (
    "DiTPipeline",
    "Img2Img",
    "Inpaint",
    "Fill",
    "Control",
    "Edit",
    "ImageToVideo",
    "VideoToVideo",
    "I2",
    "VACE",
    "Refiner",
    "Layered",
)


def info(capsys: Any, model: Path | str) -> dict[str, str]:
    assert main(["info", "--model", str(model)]) == 0
    return {line[:14].strip(): line[15:] for line in capsys.readouterr().out.splitlines()}


def test_mini_flux_is_told(capsys):
    told = info(capsys, afcache.mini_flux_folder())
    assert told == {
        "model": str(afcache.mini_flux_folder()),
        "pipeline": "FluxPipeline",
        "transformer": "FluxTransformer2DModel (12 blocks)",
        "cached": "yes, as FLUX.1",
        "compiled": "the whole step, as one graph (compile='step')",
        "guidance": "true_cfg_scale, classifier-free (default 1.0), with a negative prompt",
        "several GPUs": "yes, with torchrun",
        "the command": "draws pictures, with --steps, --height, --width, --true-cfg-scale, "
        "--negative-prompt, --max-sequence-length",
    }


def test_two_experts_are_told(capsys):
    told = info(capsys, EXPERTS)
    assert told["transformer"] == "WanTransformer3DModel (8 blocks) and WanTransformer3DModel (8 blocks)"
    assert told["cached"] == "yes, as Wan"
    assert told["guidance"] == "guidance_scale, classifier-free (default 5.0)"
    assert told["several GPUs"] == "no: one process draws"
    assert told["the command"].startswith(
        "draws videos, with --steps, --height, --width, --num-frames, --guidance-scale, --neg"
    )


@pytest.mark.parametrize(
    ("make", "name", "expected"),
    [
        (
            ltx2.make_text,
            "compiled",
            "computed steps are the model's own forward, which cannot be one graph (compile='blocks')",
        ),
        (hunyuan_video.make_text_15, "guidance", "a guider of the pipeline's, ClassifierFreeGuidance"),
        (hunyuan_video.make_text, "guidance", "guidance_scale, an input of the transformer (default 6.0)"),
        (lambda: qwen_image.make("QwenImageEditPipeline"), "the command", "no: --model "),
        (
            wan.make_control,
            "the command",
            "which needs video; the command draws from text alone. In Python, afcache.compile_pipel",
        ),
        (SPRINT.make, "cached", "no: scheduler SCMScheduler is not supported; caching knows FlowMatchEulerD"),
    ],
)
def test_what_a_pipeline_is_stands_in_its_configs(capsys, tmp_path: Path, make: Any, name: str, expected: str):
    """Weights are taken away: nothing is read of them."""
    make().save_pretrained(tmp_path)
    for path in tmp_path.rglob("*.safetensors"):
        path.unlink()
    assert expected in info(capsys, tmp_path)[name]


def test_a_pipeline_without_a_transformer_is_told_to_be_none_of_ours(capsys, tmp_path: Path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    told = info(capsys, tmp_path)
    assert told["transformer"] == "none"
    assert "is a StableDiffusionPipeline without a transformer: what is cached are diffusion transformers" in told["cached"]


@pytest.mark.parametrize("model", ["/no/such/folder", "missing"])
def test_a_model_that_is_not_there_is_one_line(capsys, model: str):
    assert f"--model {model!r}: no such folder" in fail(capsys, "info", "--model", model)


def test_nothing_is_made_of_weights():
    found = outline(Model(WAN, json.loads((Path(WAN) / "model_index.json").read_text())))
    assert {each.device for each in found.transformers[0].parameters()} == {torch.device("meta")}
    assert not hasattr(found.pipe, "vae")


@pytest.mark.parametrize("name", PIPELINES)
def test_text_is_enough_for_pipelines_that_are_not_called_after_what_they_change(name: str):
    """`LTX2ConditionPipeline` has no conditions if none are given."""
    kind: Any = getattr(diffusers, name)
    found = Outline(Model("folder", {"_class_name": name}), {}, object.__new__(kind))
    if any(word in name for word in CHANGES):
        with pytest.raises(ValueError, match=f"is a {name}, which needs .*; the command draws from text alone"):
            check_text_alone(found)
    else:
        check_text_alone(found)
        given = inspect.signature(kind.__call__).parameters
        assert (name in _TEXT_IS_ENOUGH) == bool({"image", "video"} & set(given))
