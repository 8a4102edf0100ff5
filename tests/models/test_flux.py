import pytest
import torch

from afcache._typing import HostModule
from afcache.functional.model import model_of, scaled_dot_product_attention
from afcache.functional.outputs import full_forward
from afcache.models.families import family_of
from afcache.models.flux1.architecture import FLUX, sizes
from afcache.models.flux1.backend import attention_kernel
from afcache.models.flux1.checks import check_transformer
from afcache.models.flux1.inputs import FluxInputs, host_arguments
from tests.support.tiny import tiny_flux


def make_transformer(*, guidance: bool = False, seed: int = 0) -> HostModule:
    torch.manual_seed(seed)
    transformer = tiny_flux(
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 6, 6),
    )
    return transformer.requires_grad_(False)


def make_inputs(
    *, batch: int = 1, height: int = 8, width: int = 8, text: int = 5, guidance: bool = False, dtype=torch.float32
) -> FluxInputs:
    positions = torch.cartesian_prod(torch.zeros(1), torch.arange(float(height)), torch.arange(float(width)))
    return FluxInputs(
        hidden_states=torch.randn(batch, height * width, 16, dtype=dtype),
        encoder_hidden_states=torch.randn(batch, text, 24, dtype=dtype),
        pooled_projections=torch.randn(batch, 20, dtype=dtype),
        timestep=torch.rand(batch).to(dtype),
        img_ids=positions,
        txt_ids=torch.zeros(text, 3),
        guidance=torch.full((batch,), 3.5) if guidance else None,
    )


def host_forward(transformer: HostModule, inputs: FluxInputs) -> torch.Tensor:
    return transformer(**host_arguments(inputs), return_dict=False)[0]  # pyright: ignore[reportReturnType]


def our_forward(transformer: HostModule, inputs: FluxInputs) -> torch.Tensor:
    return full_forward(model_of(transformer, FLUX, attention_kernel(transformer)), inputs)


@pytest.mark.parametrize("guidance", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("text", [1, 5, 16, 77])
@pytest.mark.parametrize("size", [(8, 8), (7, 5), (1, 9)])
def test_full_forward_equals_diffusers(guidance: bool, batch: int, text: int, size: tuple[int, int]):
    transformer = make_transformer(guidance=guidance)
    inputs = make_inputs(batch=batch, height=size[0], width=size[1], text=text, guidance=guidance)
    torch.testing.assert_close(our_forward(transformer, inputs), host_forward(transformer, inputs), rtol=0, atol=1e-5)


def test_full_forward_equals_diffusers_with_fused_projections():
    transformer, inputs = make_transformer(), make_inputs(batch=3, text=7)
    expected = host_forward(transformer, inputs)
    transformer.fuse_qkv_projections()
    assert transformer.transformer_blocks[0].attn.fused_projections
    torch.testing.assert_close(host_forward(transformer, inputs), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(our_forward(transformer, inputs), expected, rtol=0, atol=1e-5)


def test_full_forward_in_bfloat16_is_as_far_from_float32_as_diffusers():
    transformer, inputs = make_transformer(), make_inputs(batch=2, text=7)
    exact = host_forward(transformer, inputs)
    half = inputs._replace(
        hidden_states=inputs.hidden_states.to(torch.bfloat16),
        encoder_hidden_states=inputs.encoder_hidden_states.to(torch.bfloat16),
        pooled_projections=inputs.pooled_projections.to(torch.bfloat16),
    )
    transformer.to(torch.bfloat16)
    host, ours = host_forward(transformer, half).float(), our_forward(transformer, half).float()
    rounding = (host - exact).norm() / exact.norm()
    assert 1e-4 < rounding < 0.05
    assert (ours - host).norm() / exact.norm() <= rounding


def test_full_forward_uses_the_given_kernel():
    transformer, inputs = make_transformer(), make_inputs()
    calls = []

    def kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        calls.append(query.shape)
        return scaled_dot_product_attention(query, key, value)

    velocity = full_forward(model_of(transformer, FLUX, kernel), inputs)
    assert torch.equal(velocity, our_forward(transformer, inputs))
    assert calls == [(1, 3, 64 + 5, 16)] * sizes(transformer).num_blocks


def test_full_forward_leaves_its_inputs_unchanged():
    transformer, inputs = make_transformer(), make_inputs()
    tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
    before = [x.clone() for x in tensors]
    our_forward(transformer, inputs)
    assert all(torch.equal(x, y) for x, y in zip(before, tensors, strict=True))


def test_attention_kernel_follows_the_hosts_backend():
    transformer, inputs = make_transformer(), make_inputs(batch=2)
    assert attention_kernel(transformer) is scaled_dot_product_attention
    expected = our_forward(transformer, inputs)
    transformer.set_attention_backend("_native_math")
    assert attention_kernel(transformer) is not scaled_dot_product_attention
    torch.testing.assert_close(our_forward(transformer, inputs), expected, rtol=0, atol=1e-5)


def test_attention_kernel_refuses_mixed_backends():
    transformer = make_transformer()
    transformer.transformer_blocks[0].attn.processor._attention_backend = "native"
    with pytest.raises(NotImplementedError, match="attention backends differ between blocks"):
        attention_kernel(transformer)


def test_other_models_are_of_no_family():
    with pytest.raises(NotImplementedError, match="transformer is a Linear; only diffusers' FluxTransformer2DModel"):
        family_of(torch.nn.Linear(2, 2))


def test_check_transformer_refuses_unknown_processors():
    class Custom:
        def __call__(self, attn, hidden_states, **_):
            return hidden_states

    transformer = make_transformer()
    transformer.single_transformer_blocks[1].attn.set_processor(Custom())
    with pytest.raises(NotImplementedError, match=r"attention processor Custom at single_transformer_blocks\.1\.attn"):
        check_transformer(transformer)


def test_check_transformer_refuses_context_parallelism():
    transformer = make_transformer()
    transformer.transformer_blocks[1].attn.processor._parallel_config = object()
    with pytest.raises(NotImplementedError, match="context parallelism"):
        check_transformer(transformer)
