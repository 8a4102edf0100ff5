import itertools

import pytest
import torch

from afcache.functional.groups.pooling import pool_tokens


def test_short_sequences_stay_as_they_are():
    tokens = torch.randn(2, 5 + 64, 3)
    assert torch.equal(pool_tokens(tokens, txt_seq=5), tokens)


@pytest.mark.parametrize("length", [128, 4096, 100])
def test_text_is_kept_and_image_tokens_are_averaged_over_runs(length: int):
    tokens = torch.randn(2, 5 + length, 3)
    pooled = pool_tokens(tokens, txt_seq=5)
    assert pooled.shape == (2, 69, 3)
    assert torch.equal(pooled[:, :5], tokens[:, :5])
    edges = [-(-i * length // 64) for i in range(65)]
    expected = torch.stack([tokens[:, 5 + a : 5 + b].mean(dim=1) for a, b in itertools.pairwise(edges)], dim=1)
    torch.testing.assert_close(pooled[:, 5:], expected, rtol=1e-5, atol=1e-6)


def test_a_pooled_constant_is_that_constant():
    pooled = pool_tokens(torch.full((1, 3 + 130, 2), 0.7), txt_seq=3)
    torch.testing.assert_close(pooled, torch.full((1, 67, 2), 0.7))
