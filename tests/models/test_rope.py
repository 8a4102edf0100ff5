from typing import Any

import torch
from diffusers.models import embeddings

from afcache.models.flux1.rope import apply_rotary_emb


def test_apply_rotary_emb_turns_a_pair_by_its_angle():
    x = torch.tensor([1.0, 0.0])[None, None, None]
    angle = torch.tensor([[torch.pi / 6] * 2])
    turned = apply_rotary_emb(x, angle.cos(), angle.sin())
    torch.testing.assert_close(turned.flatten(), torch.tensor([3**0.5 / 2, 0.5]))


def test_apply_rotary_emb_equals_the_hosts():
    x, cos, sin = torch.randn(2, 3, 5, 8), torch.randn(5, 8), torch.randn(5, 8)
    host_rotary: Any = embeddings.apply_rotary_emb
    expected = host_rotary(x.transpose(1, 2), (cos, sin), sequence_dim=1).transpose(1, 2)
    assert torch.equal(apply_rotary_emb(x, cos, sin), expected)


def test_apply_rotary_emb_keeps_norms_and_dtype():
    x, angle = torch.randn(1, 2, 5, 8, dtype=torch.bfloat16), torch.randn(5, 4).repeat_interleave(2, dim=1)
    turned = apply_rotary_emb(x, angle.cos(), angle.sin())
    assert turned.dtype == torch.bfloat16
    torch.testing.assert_close(turned.float().norm(dim=-1), x.float().norm(dim=-1), rtol=1e-2, atol=1e-2)
