"""Inputs made by hand: whatever does not fit is refused by its name, before the first step."""

from typing import Any

import pytest
import torch
from torch import Tensor

import afcache
from bench.mini_flux.sampling import prepare

pytestmark = pytest.mark.host
SIGMAS = torch.tensor([1.0, 0.5, 0.0])


def draw(pipe: Any, change: dict[str, Any], *, to: str = "inputs") -> None:
    """Two steps with one of the branches changed."""
    inputs = prepare(pipe, [0], steps=2).branches[0]
    given = {"inputs": inputs, to: inputs._replace(**change)}
    negative = {"negative": given["negative"], "guidance_scale": 2.0} if to == "negative" else {}
    afcache.denoise(pipe.transformer, given["inputs"], SIGMAS, **negative)


@pytest.mark.parametrize("value", [None, [1.0]], ids=["none", "list"])
@pytest.mark.parametrize("field", ["hidden_states", "encoder_hidden_states", "pooled_projections", "img_ids", "txt_ids"])
def test_a_field_that_is_no_tensor_is_named(pipe, field: str, value: Any):
    said = "None" if value is None else r"\[1\.0\]"
    with pytest.raises(TypeError, match=rf"inputs\.{field} must be a tensor, got {said}; see afcache\.FluxInputs"):
        draw(pipe, {field: value})


@pytest.mark.parametrize("field", ["guidance", "image_prompt_scales", "context", "context_ids", "condition"])
def test_a_field_that_may_be_none_is_no_list(pipe, field: str):
    with pytest.raises(TypeError, match=rf"inputs\.{field} must be a tensor, or None, got \[1\.0\]"):
        draw(pipe, {field: [1.0]})


@pytest.mark.parametrize("field", ["controlnet_block_samples", "controlnet_single_block_samples", "image_prompts"])
def test_a_field_of_several_tensors_is_a_tuple_of_them(pipe, field: str):
    for value in (None, [torch.zeros(1)]):
        with pytest.raises(TypeError, match=rf"inputs\.{field} must be a tuple of tensors, got .* or use tuple\("):
            draw(pipe, {field: value})
    with pytest.raises(TypeError, match=rf"inputs\.{field}\[0\] must be a tensor, got 1\.0"):
        draw(pipe, {field: (1.0,)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"guidance": torch.ones(1)}, r"inputs\.guidance must be None for this transformer, got tensor"),
        ({"img_ids": torch.zeros(1, 64, 3)}, r"inputs\.img_ids must have 2 axes, got shape \(1, 64, 3\)"),
        ({"hidden_states": torch.zeros(64, 32)}, r"inputs\.hidden_states must have 3 axes, got shape \(64, 32\)"),
        ({"hidden_states": torch.zeros(1, 64, 32).bfloat16()}, r"must have the transformer's dtype torch\.float32, got"),
        ({"pooled_projections": torch.zeros(2, 64)}, r"pooled_projections must have as many samples as hidden_states, 1, got"),
        ({"img_ids": torch.zeros(60, 3)}, r"inputs\.img_ids must have a row for each token of hidden_states, 64, got 60"),
        ({"txt_ids": torch.zeros(9, 3)}, r"inputs\.txt_ids must have a row for each token of encoder_hidden_states, 16, got 9"),
        ({"img_ids": torch.zeros(64, 2)}, r"inputs\.img_ids must have 3 on its last axis \(positions .* got shape \(64, 2\)"),
        ({"encoder_hidden_states": torch.zeros(1, 16, 5)}, r"must have 64 on its last axis \(the last is the model's width"),
        ({"pooled_projections": torch.zeros(1, 5)}, r"inputs\.pooled_projections must have 64 on its last axis"),
        ({"context": torch.zeros(1, 4, 32)}, r"inputs\.context and context_ids must be given together, got one of them"),
        (
            {"context": torch.zeros(1, 4, 32), "context_ids": torch.zeros(3, 3)},
            r"inputs\.context_ids must have a row for each token of context, 4, got 3",
        ),
        ({"condition": torch.zeros(1, 60, 8)}, r"condition must have a row for each token of hidden_states, 64, got 60"),
        ({"image_prompts": (torch.zeros(1, 1, 8),)}, r"must be empty for a transformer without an IP-Adapter, got 1"),
        ({"img_ids": torch.zeros(64, 3, device="meta")}, r"img_ids must be on the device of hidden_states, cpu, got meta"),
    ],
)
def test_inputs_that_do_not_fit_name_the_field(pipe, change: dict[str, Tensor], message: str):
    with pytest.raises(ValueError, match=message):
        draw(pipe, change)


@pytest.mark.parametrize("field", ["encoder_hidden_states", "pooled_projections"])
def test_text_of_another_dtype_than_the_latents_is_refused(pipe, field: str):
    text = getattr(prepare(pipe, [0], steps=2).branches[0], field).bfloat16()
    message = rf"{field} must have the dtype of hidden_states, torch\.float32, got torch\.bfloat16\. Convert it"
    with pytest.raises(ValueError, match=f"inputs.{message}"):
        draw(pipe, {field: text})
    with pytest.raises(ValueError, match=f"negative.{message}"):
        draw(pipe, {field: text}, to="negative")


@pytest.mark.parametrize("empty", ["samples", "tokens"])
def test_an_empty_batch_and_an_empty_image_are_refused(pipe, empty: str):
    inputs = prepare(pipe, [0], steps=2).branches[0]
    of_samples = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")
    change = {name: getattr(inputs, name)[:0] for name in of_samples}
    if empty == "tokens":
        change = {"hidden_states": inputs.hidden_states[:, :0], "img_ids": inputs.img_ids[:0]}
    with pytest.raises(ValueError, match=r"must have at least one sample and one token, got shape \((0, 64|1, 0)"):
        draw(pipe, change)
