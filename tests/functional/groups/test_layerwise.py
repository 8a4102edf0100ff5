"""Groups of blocks on mini-FLUX: every strategy live, one graph, samples apart, guidance together."""

import dataclasses
import json

import pytest
import torch

import afcache
from afcache import CacheConfig, Layerwise, policy
from afcache.functional.groups.group import Group, estimate
from afcache.functional.groups.proposal import Memory, Proposal
from afcache.functional.model import Part
from afcache.functional.plans import schedule_steps
from afcache.functional.state import GroupRecord
from bench.mini_flux.sampling import SETTINGS, draw, prepare, prompt_of
from tests.support.sampling import largest_difference

pytestmark = pytest.mark.host
BALANCED = policy("residual")
# Bounds and thresholds at which all four strategies, and computing a group by itself, occur within one image.
GROUPS = Layerwise(groups=4, similarity_threshold=0.005, attention_threshold=0.03, difference_threshold=0.4)
LIVE = dataclasses.replace(BALANCED, layerwise=GROUPS)


def denoise(pipe, problem, config: CacheConfig, **options):
    negative = problem.branches[1] if len(problem.branches) == 2 else None
    return afcache.denoise(
        pipe.transformer,
        problem.branches[0],
        problem.sigmas,
        negative=negative,
        guidance_scale=problem.cfg,
        config=config,
        **options,
    )


def groups_of(result, branch: int = 0) -> list[GroupRecord]:
    """One for each step."""
    found = [record[branch].groups for record in result.records]
    assert all(isinstance(groups, GroupRecord) for groups in found)
    return found


def choices(result, branch: int = 0) -> torch.Tensor:
    """`[steps, groups, batch]`."""
    return torch.stack([groups.choice for groups in groups_of(result, branch)])


@pytest.mark.parametrize("groups", [1, 4, 12])
def test_groups_that_all_forecast_are_the_default_policy(pipe, groups: int):
    problem = prepare(pipe, [0, 3])
    plain = denoise(pipe, problem, BALANCED)
    grouped = denoise(pipe, problem, dataclasses.replace(BALANCED, layerwise=Layerwise(groups=groups, strategy="taylor")))
    assert [grouped.pattern(i) for i in range(2)] == [plain.pattern(i) for i in range(2)]
    # The sum of the groups' forecasts is the stack's, in another order.
    torch.testing.assert_close(grouped.latents, plain.latents, rtol=0, atol=2e-4)


def test_all_four_strategies_are_live_in_one_graph_that_equals_eager(pipe):
    problem = prepare(pipe, [3])
    eager = denoise(pipe, problem, LIVE)
    step = torch.compile(afcache.denoising_step, fullgraph=True, backend="aot_eager")
    compiled = denoise(pipe, problem, LIVE, step=step)
    assert torch.equal(choices(compiled), choices(eager))
    torch.testing.assert_close(compiled.latents, eager.latents, rtol=0, atol=1e-4)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    found = choices(eager)[..., 0]
    assert set(found.flatten().tolist()) == {0, 1, 2, 3, 4}
    # Groups that computed while others did not: a branch of its own for each.
    is_mixed = (found == 0).any(dim=1) & (found != 0).any(dim=1)
    assert is_mixed.any()


@pytest.mark.compile
def test_the_same_under_inductor(short):
    problem = prepare(short, [3])
    config = dataclasses.replace(LIVE, layerwise=dataclasses.replace(GROUPS, groups=1))
    eager = denoise(short, problem, config)
    compiled = denoise(short, problem, config, step=torch.compile(afcache.denoising_step, fullgraph=True))
    assert len(choices(eager).unique()) > 1
    assert torch.equal(choices(compiled), choices(eager))
    torch.testing.assert_close(compiled.latents, eager.latents, rtol=0, atol=2e-3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_sample_does_not_depend_on_its_neighbours(pipe):
    seeds = [0, 3, 14]
    together = denoise(pipe, prepare(pipe, seeds), LIVE)
    for index, seed in enumerate(seeds):
        alone = denoise(pipe, prepare(pipe, [seed]), LIVE)
        assert torch.equal(choices(alone)[..., 0], choices(together)[..., index])
        torch.testing.assert_close(alone.latents[0], together.latents[index], rtol=0, atol=1e-4)
    assert not torch.equal(choices(together)[..., 0], choices(together)[..., 1])


def test_shared_decisions_let_all_samples_compute_a_group_that_one_of_them_needs(pipe):
    problem = prepare(pipe, [0, 3])
    found = choices(denoise(pipe, problem, dataclasses.replace(LIVE, batch_decisions="shared")))
    assert torch.equal(found[..., 0] == 0, found[..., 1] == 0)
    apart = choices(denoise(pipe, problem, LIVE))
    assert not torch.equal(apart[..., 0] == 0, apart[..., 1] == 0)


def test_one_step_can_be_plotted(pipe, tmp_path):
    afcache.compile_pipeline(pipe, LIVE, compile=False)
    draw(pipe, 3, steps=1)
    afcache.report(pipe).plot(tmp_path / "one.png")
    assert (tmp_path / "one.png").exists()


def test_guidance_branches_do_the_same_group_by_group(pipe):
    problem = prepare(pipe, [3], cfg=2.0)
    result = denoise(pipe, problem, LIVE)
    assert torch.equal(choices(result, 0), choices(result, 1))
    assert "." in result.pattern()
    afcache.compile_pipeline(pipe, LIVE, compile=False)
    # The pipeline infers the scale from the first step, so that it may decide otherwise at the second.
    latents = draw(pipe, 3, cfg=2.0, output_type="latent")
    assert afcache.report(pipe).pattern().replace("p", ".") == result.pattern()
    assert largest_difference(latents, result.latents[0].numpy()) < 1e-3


def test_the_state_is_what_the_report_says_and_the_pipeline_agrees(pipe, tmp_path):
    afcache.compile_pipeline(pipe, LIVE, compile=False)
    draw(pipe, 3)
    report = afcache.report(pipe)
    expected = denoise(pipe, prepare(pipe, [3]), LIVE)
    assert report.pattern().replace("p", ".") == expected.pattern()
    names = ("computed", "taylor", "similarity", "attention", "difference")
    for step in report.steps:
        for index, group in enumerate(step.groups):
            record = groups_of(expected)[step.step]
            assert names.index(group.choice[0]) == int(record.choice[index, 0])
            assert group.stability_class[0] == int(record.stability_class[index, 0])
    ran = sum(3 * sum(group.choice[0] == "computed" for group in step.groups) for step in report.steps)
    partial = sum(3 * sum(group.choice[0] == "attention" for group in step.groups) for step in report.steps)
    assert (report.block_evaluations, report.mlp_evaluations) == (ran, partial)
    # float32: histories 4 groups x 2 nodes, two summaries of each group, attention outputs of 12 blocks; 16 + 64 tokens of 96.
    tokens = 80 * 96 * 4
    maps = 4 * 80 * 80 * 4
    trail = 64 * 32 * 4
    assert 0 < report.state_bytes - ((8 + 8 + 12) * tokens + maps + trail) < 1000
    assert "s similarity" in str(report)
    report.plot(tmp_path / "report.png")
    report.to_json(tmp_path / "report.json")
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored["steps"][5]["groups"][1]["choice"] == list(report.steps[5].groups[1].choice)
    assert (tmp_path / "report.png").stat().st_size > 10_000


def test_thresholds_follow_the_measured_error(pipe):
    assert LIVE.layerwise is not None
    fixed = dataclasses.replace(LIVE.layerwise, adapt_thresholds=False)
    problem = prepare(pipe, [3])
    moving = denoise(pipe, problem, LIVE)
    still = denoise(pipe, problem, dataclasses.replace(LIVE, layerwise=fixed))
    gains = [float(groups.gain[0]) for groups in groups_of(moving)]
    assert gains[0] == 1.0
    assert len(set(gains)) > 3
    assert {float(groups.gain[0]) for groups in groups_of(still)} == {1.0}


def test_the_gain_is_what_the_measured_errors_say(pipe):
    """Again in scalars: |sum of (sigma_{j+1} - sigma_j) g_j| e / g against the tolerance, g = |sigma - sigma_n|."""
    assert (LIVE.growth_exponent, LIVE.error_law) == (1.0, "power")
    problem = prepare(pipe, [14])
    result, sigmas = denoise(pipe, problem, LIVE), problem.sigmas.tolist()
    tolerance = float(schedule_steps(problem.sigmas, LIVE)[0].tolerance)
    gain, last, lag, expected = 1.0, sigmas[0], 0.0, []
    for step, (record,) in enumerate(result.records):
        grown = last - sigmas[step]
        if record.refresh[0]:
            if lag:
                incurred = abs(lag) * float(record.measured_error[0]) / grown
                gain = min(4.0, gain * 1.05) if incurred <= tolerance else max(0.25, gain * 0.7)
            last, lag = sigmas[step], 0.0
        else:
            lag += (sigmas[step + 1] - sigmas[step]) * grown
        expected.append(gain)
    found = [float(groups.gain[0]) for groups in groups_of(result)]
    assert found == pytest.approx(expected, rel=1e-5)
    assert min(found) < 1 < max(found)


def test_what_a_group_is_expected_to_add_follows_its_class():
    history = torch.stack([torch.full((4, 3, 2), value) for value in (1.0, 2.0)])
    unknown = torch.zeros(4)
    memory = Memory(history, unknown, unknown, torch.full((4,), 2), *(unknown,) * 4)
    forecast = Proposal(torch.full((4, 3, 2), 7.0), torch.ones(4, dtype=torch.bool), unknown, unknown)
    group = Group(Part(0, 3), memory, forecast, torch.arange(4), torch.zeros(4, dtype=torch.int64))

    def expected(strategy) -> list[float]:
        return estimate(group, Layerwise(strategy=strategy))[:, 0, 0].tolist()

    assert expected("by_stability") == [7.0, 1.0, 1.0, 1.0]
    assert expected("taylor") == [7.0] * 4
    assert expected("difference") == [1.0] * 4


def test_groups_do_not_outnumber_blocks_and_some_blocks_are_left_to_cache(pipe):
    with pytest.raises(ValueError, match="groups must be at most the number of blocks of the transformer, 12, got 13"):
        afcache.compile_pipeline(pipe, policy("layerwise", groups=13))
    with pytest.raises(ValueError, match=r"must be less than the number of blocks of the transformer, 12, got 8 \+ 4"):
        afcache.compile_pipeline(pipe, policy("dbcache", last_blocks=4))


def test_a_second_image_starts_afresh(pipe):
    afcache.compile_pipeline(pipe, LIVE, compile=False)
    options = {"num_inference_steps": 12, "output_type": "latent", **SETTINGS}
    images = [pipe(prompt_of(3), generator=torch.Generator().manual_seed(3), **options).images for _ in range(2)]
    assert torch.equal(*images)
