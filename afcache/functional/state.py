"""The values that are threaded through the denoising steps: tensors only, fixed shapes from step zero."""

from typing import NamedTuple

from jaxtyping import Bool
from torch import Tensor

from afcache._typing import (
    AttentionMaps,
    BlockOutputs,
    Counts,
    Flag,
    Flags,
    Forced,
    GroupCounts,
    GroupHistories,
    GroupNodes,
    History,
    Level,
    Nodes,
    PerGroup,
    PerSample,
    Response,
    Setting,
    StepIndex,
    Summaries,
    Tokens,
    Velocity,
    Votes,
    Window,
)
from afcache.functional.process import Process


class GateState(NamedTuple):
    """What a gate compares each step with.

    Attributes:
        reference: "teacache": the first block's modulated input at the step before; "dbcache": what the first blocks added at
            the last refresh; float32 `[batch, img_seq, dim]`.
        accumulated: "teacache": rescaled changes since the last refresh; float32 `[batch]`.
        num_cached: cached steps since the last refresh; int64 `[batch]`.

    """

    reference: Tokens
    accumulated: PerSample
    num_cached: Counts


class GroupState(NamedTuple):
    """What each group of blocks remembers; `seq` counts text and image tokens, text first.

    Summaries have `coarse` tokens: the text, and image tokens pooled to 64 at most. What the strategies in use do not need
    has no elements.

    Attributes:
        history: residuals of the group at its last computations, newest first; `[groups, nodes, batch, seq, dim]`.
        nodes: their sigmas; float32 `[groups, nodes, batch]`.
        steps: their step indices; float32 `[groups, nodes, batch]`.
        num_nodes: how many of them are filled; int64 `[groups, batch]`.
        inputs: pooled input at the last computation; `[groups, batch, coarse, dim]`.
        modulated: pooled input of its first block after modulation; `[groups, batch, coarse, dim]`.
        attention_map: its first block's coarse attention map; float32 `[groups, batch, coarse, coarse]`.
        attention: attention outputs of all blocks of the stack; `[blocks, batch, seq, dim]`.
        stability: moving average of corrected cosine similarities; float32 `[groups, batch]`.
        stability_class: 0 (most stable) to 3; int64 `[groups, batch]`.
        num_measured: how often the stability was measured; int64 `[groups, batch]`.
        gain: factor of the thresholds; float32 `[batch]`.

    """

    history: GroupHistories
    nodes: GroupNodes
    steps: GroupNodes
    num_nodes: GroupCounts
    inputs: Summaries
    modulated: Summaries
    attention_map: AttentionMaps
    attention: BlockOutputs
    stability: PerGroup
    stability_class: GroupCounts
    num_measured: GroupCounts
    gain: PerSample


class Trail(NamedTuple):
    """Where a guidance branch's last step leads if it is taken by that branch's velocity alone, in Euler's way.

    Attributes:
        latents: x + (sigma_next - sigma) v; float32 `[batch, *latent]`.
        length: norm of that step; float32 `[batch]`.
        sigma: sigma_next; NaN until there was a step; float32 `[batch]`.

    """

    latents: Velocity
    length: PerSample
    sigma: PerSample


class SolverState(NamedTuple):
    """What a solver that mixes several outputs has been given (`afcache.functional.solver_response`), newest first.

    Attributes:
        pending: g at each forecast step since the last refresh, whose errors nobody knows yet; 0 elsewhere.
        settled: what the outputs before were off by, in units of `direction`.
        direction: d = v - v_hat at the last refresh; float32 `[batch, *latent]`.

    """

    pending: Window
    settled: Window
    direction: Velocity


class CacheState(NamedTuple):
    """What one guidance branch remembers between steps. A value: each step returns a new one.

    Only a step that was given a `writer` ends the life of the state that it read (see `cached_forward`).

    Attributes:
        history: what the config's target keeps of the last refreshes, newest first; not corrected. Of "residual" (stack
            output - stack input) the image tokens, `[nodes, batch, img_seq, dim]` in the model's dtype; with blocks that run at
            every step it is the residual of the others, text tokens first; with groups it has no tokens. Of "velocity" and
            "noise" float32, `[nodes, batch, *latent]`.
        nodes: their sigmas, newest first; float32 `[nodes, batch]`.
        steps: their step indices, newest first; float32 `[nodes, batch]`.
        num_nodes: how many of them are filled; int64 `[batch]`.
        error_rate: c = e / g of the last measurement; infinite until there is one; float32 `[batch]`.
        error_order: order of the row that was measured; int64 `[batch]`.
        accumulated_error: predicted contributions since the last refresh (`afcache.functional.error_control.contribution`);
            relative velocity error times sigma, weighted; float32 `[batch]`.
        last_gap: distance in sigma between the last two refreshes; 0 until there are two; float32 `[batch]`.
        lag: sum of (sigma_{j+1} - sigma_j) g(sigma_j) over the forecast steps since the last refresh; float32 `[batch]`.
        trail: where the last step leads; None where nothing is to notice that the next begins elsewhere.
        gate: under policies with a gate.
        groups: with groups of blocks.
        solver: under solvers that mix several outputs, where what they were given wrongly is returned.
        damping: learnt (`afcache.functional.damping`), NaN until it is; float32 `[batch]`; None where it stays as it is set.

    """

    history: History
    nodes: Nodes
    steps: Nodes
    num_nodes: Counts
    error_rate: PerSample
    error_order: Counts
    accumulated_error: PerSample
    last_gap: PerSample
    lag: PerSample
    trail: Trail | None = None
    gate: GateState | None = None
    groups: GroupState | None = None
    solver: SolverState | None = None
    damping: PerSample | None = None


class StepSchedule(NamedTuple):
    """Where a step stands, and what is set for it. All tensors: a Python number that changes would recompile at every value.

    0-d, or `[batch]` where samples stand at steps of their own; `response` is `[window]`, or then `[window, batch]`. Another
    shape is another graph.

    Attributes:
        sigma: noise level of the step; float32.
        sigma_next: noise level after it; float32.
        step_index: steps done before this one in the trajectory; int64.
        is_forced: the step is computed whatever is seen (see `afcache.functional.plans`); bool.
        tolerance: limit of the accumulated error; float32.
        max_growth: limit of the distance to the last refresh, in units of the one before; infinity means none; float32.
        damping: 0 forecasts in full, 1 reuses what the last refresh kept; float32.
        noise_floor: relative velocity error that rounding alone makes; float32.
        response: what the last outputs weigh in the latents after the step, newest first; float32; None under Euler's step.
        process: of a model that is no flow's; None of a flow.

    """

    sigma: Level
    sigma_next: Level
    step_index: StepIndex
    is_forced: Forced
    tolerance: Setting
    max_growth: Setting
    damping: Setting
    noise_floor: Setting
    response: Response | None = None
    process: Process | None = None


class Lead(NamedTuple):
    """What the leading guidance branch found at a refresh, for the branch after it.

    Attributes:
        velocity: v_1 as computed, not corrected; `[batch, *latent]`.
        forecast: v_hat_1; of the same shape. At cached steps both are without meaning.

    """

    velocity: Velocity
    forecast: Velocity


class Coupling(NamedTuple):
    """How a guidance branch shares the decision of its step with the others.

    The branch that is called first leads: it decides for all, from all predicted errors.

    Attributes:
        is_follower: 0-d bool; a follower adopts `leader_refresh`.
        leader_refresh: the leader's decision; bool `[batch]`; unused by the leader.
        weight: factor of the leader's own predicted error, |s| under guidance scale s, else 1; float32 `[batch]`.
        others_error: weighted sum of the other branches' predicted errors; float32 `[batch]`.
        leader_choice: what each group did in the leader (see `GroupRecord`); int64 `[groups, batch]`; with groups alone.
        guidance_scale: s, NaN where it is unknown; float32 `[batch]`; None measures each branch's own error.
        lead: what the leading branch found, where branches are called one after the other.
        known: whether the blocks run, where the host knows that before the step: bool, 0-d, on the CPU, or a Python bool that a
            step is made for; the flags that the step decides by must not ask for more. None where the step's own decision is
            read.
        trails: of branches that are called after this one; None where the step does not look whether it begins where the last
            one led (`afcache.functional.continuity`).
        leader_restarted: what the leader found of that; bool `[batch]`; unused by the leader.

    """

    is_follower: Flag
    leader_refresh: Flags
    weight: PerSample
    others_error: PerSample
    leader_choice: GroupCounts | None = None
    guidance_scale: PerSample | None = None
    lead: Lead | None = None
    known: Flag | bool | None = None
    trails: tuple[Trail, ...] | None = None
    leader_restarted: Flags | None = None


class GroupRecord(NamedTuple):
    """What each group of blocks did at a step.

    Attributes:
        choice: per sample: 0 computed, 1 forecast, 2 reused by similarity, 3 attention outputs reused and MLPs computed,
            4 reused by difference detection; int64 `[groups, batch]`.
        is_computed: the group's blocks ran; bool `[groups]`.
        is_partial: the group's MLPs ran on reused attention outputs; bool `[groups]`.
        distance: the statistic that the chosen strategy compared with its threshold, NaN for forecasts; float32
            `[groups, batch]`.
        threshold: that threshold, 0 where the step was refreshed; float32 `[groups, batch]`.
        stability: after the step; float32 `[groups, batch]`.
        stability_class: after the step; int64 `[groups, batch]`.
        gain: factor of the thresholds, after the step; float32 `[batch]`.

    """

    choice: GroupCounts
    is_computed: Bool[Tensor, " groups"]
    is_partial: Bool[Tensor, " groups"]
    distance: PerGroup
    threshold: PerGroup
    stability: PerGroup
    stability_class: GroupCounts
    gain: PerSample


class StepRecord(NamedTuple):
    """What a step did, for the report; read by the host at the end only.

    Attributes:
        refresh: the decision per sample; bool `[batch]`.
        is_computed: the block stack ran; bool, 0-d.
        predicted_error: relative velocity error expected of this step's forecast; float32 `[batch]`.
        measured_error: the error that a refresh found; NaN on other steps and before the first forecast; float32 `[batch]`.
        accumulated_error: the estimate after this step, 0 after a refresh; the leading branch's is the guided velocity's, the
            others' are their own; float32 `[batch]`.
        groups: what each group of blocks did, where there are groups.
        restarted: the latents were not where the last step had led, so that the sample began anew; bool `[batch]`; None where
            nobody looked.
        votes: what every rank decided by itself, 0 to compute, under the debug option of parallel runs alone; int64
            `[decisions, ranks, batch]`: one decision, or one for each group where there are groups.

    """

    refresh: Flags
    is_computed: Flag
    predicted_error: PerSample
    measured_error: PerSample
    accumulated_error: PerSample
    groups: GroupRecord | None = None
    restarted: Flags | None = None
    votes: Votes | None = None
