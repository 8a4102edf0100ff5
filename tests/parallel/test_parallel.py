"""Several processes draw what one draws: real xfuser groups over gloo."""

from collections.abc import Callable

import pytest
import torch

from tests.support.parallel_cases import CASES, Drawn
from tests.support.parallel_layouts import LAYOUTS, Met, Task

pytestmark = [pytest.mark.dist, pytest.mark.timeout(900)]
Alone = Callable[[str], Drawn]
RanksOf = Callable[[str], list[Met]]


def on(layout: str, *values: object) -> object:
    """Values of a test of one layout, whose tests share a process, so that its ranks are started once."""
    return pytest.param(layout, *values, id="-".join(map(str, (layout, *values))), marks=pytest.mark.xdist_group(layout))


def assert_same(expected: Drawn, ranks: list[Met], task: Task) -> None:
    """Every rank drew the one image, by the one process's decisions, with one graph."""
    case = CASES[task.case]
    tolerance = 2e-3 if case.backend == "inductor" else 1e-4
    branches = len(expected.decisions) // case.steps
    leading = expected.decisions[::branches]
    assert (expected.correction == "solver") == case.mixes
    for rank in ranks:
        drawn = rank.drawn[task]
        assert drawn.correction == expected.correction
        assert (drawn.latents - expected.latents).abs().max() < tolerance
        assert torch.equal(drawn.latents, ranks[0].drawn[task].latents)
        own = len(drawn.decisions) // case.steps
        # With cfg parallelism the first step computes every branch, the others one.
        is_split = len(drawn.decisions) % case.steps != 0
        steps = drawn.decisions[branches - 1 :] if is_split else drawn.decisions[::own]
        assert steps == leading
        choices = drawn.choices[branches - 1 :] if is_split else drawn.choices[::own]
        assert choices[1:] == expected.choices[::branches][1:]
        if case.config.policy != "none":
            assert {(True,), (False,)} == set(steps)
        if task.is_compiled and case.backend:
            assert drawn.graphs == 1
        assert drawn.breaks == 0


def tasks_of(layout: str) -> list[Task]:
    """The images that are compared with one process's."""
    return [task for task in LAYOUTS[layout].tasks if not task.case.startswith(("counted", "looked"))]


@pytest.mark.parametrize(
    ("layout", "task"),
    [on(layout, task) for layout in LAYOUTS for task in tasks_of(layout)],
)
def test_ranks_draw_what_one_process_draws(layout: str, task: Task, alone: Alone, ranks_of: RanksOf):
    assert_same(alone(task.case), ranks_of(layout), task)


@pytest.mark.parametrize("layout", [on("ulysses"), on("ring")])
def test_groups_of_blocks_compute_and_follow_strategies_on_every_rank(layout: str, ranks_of: RanksOf):
    (task,) = (task for task in LAYOUTS[layout].tasks if task.case == "layerwise" and not task.is_checked)
    for rank in ranks_of(layout):
        assert {"computed", "attention", "similarity"} <= {choice for step in rank.drawn[task].choices for choice in step}


@pytest.mark.parametrize(
    ("layout", "task"),
    [on(layout, task) for layout in LAYOUTS for task in LAYOUTS[layout].tasks if task.case.startswith("counted")],
)
def test_the_report_counts_every_message(layout: str, task: Task, ranks_of: RanksOf):
    for rank in ranks_of(layout):
        drawn = rank.drawn[task]
        # Where guidance branches are on different ranks, the second one's calls are answered by the first's, but at first.
        sent = [*drawn.counted[:2], *drawn.counted[2::2]] if layout == "guidance" else drawn.counted
        assert sent
        assert drawn.reported == sent
        # Guidance branches on different ranks exchange nothing within their blocks.
        is_constant = (layout == "guidance" and "noise" not in task.case) or task.case.endswith("uncached")
        assert (len({collectives for collectives, _ in sent}) == 1) == is_constant


@pytest.mark.parametrize("layout", [on("ulysses")])
def test_cached_steps_gather_and_sum_statistics_and_nothing_else(layout: str, ranks_of: RanksOf):
    """In the graph itself: of the adaptive policy, without guidance branches, the velocity's gathering is all there is."""
    for rank in ranks_of(layout):
        drawn = rank.drawn[Task("looked into", is_compiled=True)]
        blocks, per_block, measured_error = 3, 2, 1
        assert drawn.branches == (1, blocks * per_block + measured_error, 0)
        assert {count for count, _ in drawn.reported} == {1, 1 + blocks * per_block + measured_error}


@pytest.mark.parametrize("layout", [on("ulysses")])
def test_cached_steps_that_forecast_outputs_send_nothing(layout: str, ranks_of: RanksOf):
    """In the graph, and in the running step; computed ones gather the velocity, and adopt the error of the first rank."""
    blocks, per_block, velocity, adopted = 3, 2, 1, 1
    at_refresh = blocks * per_block + velocity + adopted
    for rank in ranks_of(layout):
        assert rank.drawn[Task("looked into, noise", is_compiled=True)].branches == (0, at_refresh, 0)
        drawn = rank.drawn[Task("counted, noise")]
        sent = [at_refresh if any(refreshed) else 0 for refreshed in drawn.decisions]
        assert [collectives for collectives, _ in drawn.counted] == sent
        assert set(sent) == {0, at_refresh}


@pytest.mark.parametrize("layout", [on("guidance")])
def test_ranks_that_share_guidance_branches_send_nothing_at_cached_steps_either(layout: str, ranks_of: RanksOf):
    """Computed steps exchange both velocities, and adopt the errors of the first rank: two messages."""
    for rank in ranks_of(layout):
        drawn = rank.drawn[Task("counted, noise")]
        # The first step is two calls; of the others the second is answered by the first.
        sent = [2 * any(refreshed) for refreshed in drawn.decisions]
        collectives = [count for count, _ in drawn.counted]
        assert collectives[:2] == sent[:2]
        assert collectives[2::2] == sent[2:]
        assert not any(collectives[3::2])
        assert set(sent) == {0, 2}
