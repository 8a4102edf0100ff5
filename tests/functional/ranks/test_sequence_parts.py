"""The parts of sequence parallelism that need no other process: shards, padding, merged softmaxes."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from afcache.functional.model import Lengths
from afcache.functional.ranks.attention import SequenceRanks, attend, merge, sequence_attention
from afcache.functional.ranks.collectives import Ranks, all_gather, all_sum, all_to_all, shift
from afcache.functional.ranks.sharding import is_real, join_shards, take_shard


def ranks_of(size: int) -> list[Ranks]:
    return [Ranks("group", rank, size) for rank in range(size)]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("length", [1, 5, 12])
def test_shards_joined_are_the_sequence(size: int, length: int):
    x = torch.randn(2, length, 3)
    shards = torch.stack([take_shard(x, ranks, dim=1) for ranks in ranks_of(size)])
    assert torch.equal(join_shards(shards, length), x)


def test_missing_tokens_are_zero_and_known_as_padding():
    x = torch.ones(1, 5, 2)
    shards = [take_shard(x, ranks, dim=1) for ranks in ranks_of(4)]
    assert [shard[0, :, 0].tolist() for shard in shards] == [[1, 1], [1, 1], [1, 0], [0, 0]]
    real = [is_real(5, ranks, x.device) for ranks in ranks_of(4)]
    assert [flags.tolist() for flags in real] == [[True, True], [True, True], [True, False], [False, False]]


def test_a_shard_owns_its_memory():
    x = torch.randn(1, 4, 2)
    for ranks in ranks_of(2):
        assert take_shard(x, ranks, dim=1).untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


@pytest.mark.parametrize("scale", [1.0, 300.0])
@pytest.mark.parametrize("parts", [(4, 4), (1, 6, 3), (2, 2, 2, 2)])
def test_attention_merged_over_parts_is_attention_over_all(scale: float, parts: tuple[int, ...]):
    """Scores of hundreds overflow a softmax that is not stable."""
    query = scale * torch.randn(2, 3, 5, 8)
    key, value = torch.randn(2, 2, 3, sum(parts), 8).unbind()
    pieces = [attend(query, *pair, bias=None) for pair in zip(key.split(parts, 2), value.split(parts, 2), strict=True)]
    output, weight = pieces[0]
    for piece in pieces[1:]:
        output, weight = merge(output, weight, *piece)
    torch.testing.assert_close(output, scaled_dot_product_attention(query, key, value), rtol=1e-4, atol=1e-5)


def test_a_part_that_is_all_padding_weighs_nothing():
    query, key, value = torch.randn(3, 1, 2, 4, 8).unbind()
    nothing = torch.full((1, 1, 1, 4), torch.finfo(torch.float32).min / 2)
    real = attend(query, key, value, bias=None)
    padded = attend(query, torch.zeros_like(key), torch.zeros_like(value), bias=nothing)
    for first, second in ((real, padded), (padded, real)):
        output, _ = merge(*first, *second)
        assert torch.equal(output, real[0])


def test_a_device_without_a_kernel_that_tells_weights_computes_them():
    """The formula itself, against the kernel of this device."""
    query, key, value = torch.randn(3, 1, 2, 4, 8).unbind()
    output, weight = attend(query, key, value, bias=None)
    scores = query @ key.mT / 8**0.5
    torch.testing.assert_close(weight, scores.logsumexp(dim=-1))
    torch.testing.assert_close(output, scores.softmax(dim=-1) @ value)


def test_a_rank_that_is_alone_communicates_nothing():
    x, alone = torch.randn(1, 4), Ranks()
    assert all_sum(x, alone) is x
    assert all_to_all(x, alone) is x
    assert shift(x, alone) is x
    assert torch.equal(all_gather(x, alone), x[None])
    query, key, value = torch.randn(3, 1, 2, 6, 8).unbind()
    exact = scaled_dot_product_attention(query, key, value)
    output = sequence_attention(
        query, key, value, ranks=SequenceRanks(), lengths=Lengths(2, 4), kernel=scaled_dot_product_attention
    )
    torch.testing.assert_close(output, exact)
