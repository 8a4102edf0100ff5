"""Where the sample is in an argument, and in what a transformer returns for it."""

import torch

from afcache.models.hosted.samples import Cut, cut_output, fill_output, place_sample, read_sample

REFERENCES, TOKENS, WORDS = 2, 3, 4
LAST = (Cut(1, -TOKENS, TOKENS),)
PAIR = (Cut(1, 1, TOKENS), Cut(1, 2, 1, is_beside=True))


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_a_cut_may_be_counted_from_the_end():
    argument = numbers(1, REFERENCES + TOKENS, 5)
    sample = argument[:, REFERENCES:]
    assert torch.equal(read_sample(argument, LAST), sample)
    for length in (TOKENS, REFERENCES + TOKENS, WORDS + REFERENCES + TOKENS):
        output = numbers(1, length, 5)
        assert torch.equal(cut_output(output, LAST), output[:, -TOKENS:])
    filled = fill_output(sample, argument, LAST)
    assert torch.equal(filled[:, REFERENCES:], sample)
    assert not filled[:, :REFERENCES].any()
    assert torch.equal(place_sample(argument, 2 * sample, LAST)[:, REFERENCES:], 2 * sample)


def test_a_sample_and_what_is_beside_it_are_cut_each_by_its_own():
    pair = numbers(1, 1 + TOKENS, 4), numbers(1, 3, 2)
    row = read_sample(pair, PAIR)
    assert row.shape == (1, TOKENS * 4 + 2)
    assert torch.equal(cut_output(pair, PAIR), row)
    first, second = fill_output(row, pair, PAIR)
    assert (first.shape, second.shape) == (pair[0].shape, pair[1].shape)
    assert torch.equal(first[:, 1:], pair[0][:, 1:])
    assert torch.equal(second[:, 2:], pair[1][:, 2:])
    assert not first[:, :1].any()
    assert not second[:, :2].any()
    placed = place_sample(pair, 2 * row, PAIR)
    assert torch.equal(placed[0], torch.cat([pair[0][:, :1], 2 * pair[0][:, 1:]], dim=1))
    assert torch.equal(placed[1], torch.cat([pair[1][:, :2], 2 * pair[1][:, 2:]], dim=1))
