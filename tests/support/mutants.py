"""The faults that `python -m tests.mutants` plants: one expression each, found once in its file, in the words of the code."""

from typing import NamedTuple


class Mutant(NamedTuple):
    """A fault.

    Attributes:
        name: of the fault.
        file: under afcache/.
        old: the exact text that it replaces; found once in the file.
        new: what it puts there.
        tests: files or node ids under tests/ that must catch it.
        only: an expression of pytest's -k; empty: all of them.

    """

    name: str
    file: str
    old: str
    new: str
    tests: str
    only: str = ""


ERROR_CONTROL, STEP, RANKS = "functional/error_control.py", "functional/step.py", "functional/ranks/step.py"
ERROR_TESTS, STEP_TESTS = "functional/test_error_control.py", "functional/test_step.py"
SOLVER, SOLVER_TESTS = "functional/solver_response.py", "functional/test_solver_response.py"
CONTINUITY, CONTINUITY_TESTS = "functional/continuity.py", "functional/test_continuity.py"
PARALLEL_TESTS, GROUP_TESTS = "parallel/test_parallel.py", "functional/groups/test_layerwise.py"
MUTANTS = (
    # Signs.
    Mutant("catch-up with the wrong sign", ERROR_CONTROL, "+ factor * difference", "- factor * difference", ERROR_TESTS),
    Mutant("lag of the wrong sign", ERROR_CONTROL, "lag + (sigma_next", "lag - (sigma_next", ERROR_TESTS),
    Mutant("a solver told the opposite", SOLVER, "_finite(-(response", "_finite((response", SOLVER_TESTS),
    Mutant("what an earlier refresh left is lost", SOLVER, "found + _share(", "found + 0 * _share(", SOLVER_TESTS),
    Mutant(
        "Euler step backwards",
        STEP,
        "per_sample(schedule.sigma_next - schedule.sigma, velocity) * velocity",
        "per_sample(schedule.sigma - schedule.sigma_next, velocity) * velocity",
        "sampling/test_loop.py",
        "tolerance_zero",
    ),
    Mutant(
        "guidance away from the prompt",
        "functional/guidance.py",
        "(velocity - other)",
        "(other - velocity)",
        "sampling/test_loop.py",
        "tolerance_zero",
    ),
    Mutant(
        "forecast to the other side",
        "functional/forecast.py",
        "(sigma - nodes[j]) /",
        "(nodes[j] - sigma) /",
        "functional/test_forecast.py",
    ),
    Mutant(
        "noise adds to what is measured",
        "functional/rounding.py",
        "measured.square() - floor.square()",
        "measured.square() + floor.square()",
        "functional/test_rounding.py",
    ),
    # Comparisons.
    Mutant(
        "tolerance may be reached", ERROR_CONTROL, "(accumulated < tolerance) &", "(accumulated <= tolerance) &", ERROR_TESTS
    ),
    Mutant(
        "growth without two refreshes",
        ERROR_CONTROL,
        "is_gradual = gap <= max_growth * last_gap",
        "is_gradual = ~(gap > max_growth * last_gap)",
        ERROR_TESTS,
    ),
    Mutant(
        "a damping of nothing costs bits",
        "functional/forecast.py",
        "damping == 0",
        "damping < 0",
        "functional/test_forecast.py",
    ),
    Mutant(
        "NaN is fine",
        ERROR_CONTROL,
        "(accumulated < tolerance) & torch.isfinite(accumulated)",
        "~(accumulated >= tolerance)",
        ERROR_TESTS,
    ),
    Mutant(
        "a gate's NaN is fine",
        "functional/gates/gate.py",
        "~(change < config.threshold)",
        "(change >= config.threshold)",
        "functional/gates/test_gate.py",
    ),
    Mutant(
        "one cached step too many",
        "functional/gates/gate.py",
        "state.num_cached >= config",
        "state.num_cached > config",
        "functional/gates/test_gate.py",
    ),
    Mutant(
        "every call is a new image",
        "runtime/trajectories.py",
        "step.index in (each.index, each.index + 1)",
        "step.index in (each.index + 2, each.index + 1)",
        "pipelines/test_guidance.py",
        "decide_together",
    ),
    # Clones left out.
    Mutant(
        "cached velocity handed through",
        STEP,
        "velocity=prepared.velocity.clone()",
        "velocity=prepared.velocity",
        STEP_TESTS,
        "one_graph",
    ),
    Mutant("cached history handed through", STEP, "history.clone() if is_pure", "history if is_pure", STEP_TESTS, "fresh"),
    Mutant(
        "group's tokens handed through",
        "functional/groups/proposal.py",
        "(kept.clone(), attention.clone())",
        "(kept, attention)",
        GROUP_TESTS,
        "all_four",
    ),
    # Axes and orders.
    Mutant(
        "distance over all samples",
        "functional/distance.py",
        'reduce(x.square(), "batch ... -> batch", "sum")',
        "x.square().sum().expand(x.shape[0])",
        "functional/test_distance.py",
    ),
    Mutant(
        "image before text",
        "models/flux1/attention.py",
        "(torch.cat([t, i], dim=2)",
        "(torch.cat([i, t], dim=2)",
        "models/test_flux.py",
    ),
    Mutant(
        "history from the wrong end",
        "functional/forecast.py",
        "[newest.to(history.dtype)[None], history[:-1]]",
        "[history[1:], newest.to(history.dtype)[None]]",
        "functional/test_forecast.py",
    ),
    Mutant(
        "past and present exchanged",
        "functional/groups/stability.py",
        "torch.lerp(similarity, stability, decay)",
        "torch.lerp(stability, similarity, decay)",
        "functional/groups/test_stability.py",
    ),
    Mutant(
        "hysteresis inside out",
        "functional/groups/stability.py",
        "(-margin, 0.0, margin)",
        "(margin, 0.0, -margin)",
        "functional/groups/test_stability.py",
    ),
    # Off by one, left out, miscounted.
    Mutant(
        "one step of warmup more",
        "functional/plans.py",
        "step < warmup for",
        "step <= warmup for",
        STEP_TESTS,
    ),
    Mutant(
        "fixed intervals a step late",
        "functional/plans.py",
        "range(config.warmup_steps - 1, num_steps",
        "range(config.warmup_steps, num_steps",
        "functional/test_step_variants.py",
    ),
    Mutant(
        "followers without a history forecast",
        "functional/decision.py",
        "coupling.leader_refresh | (state.num_nodes == 0)",
        "coupling.leader_refresh",
        "functional/test_decision.py",
    ),
    Mutant(
        "an estimate that starts anew at every look ahead",
        "functional/decision.py",
        "initial=state.accumulated_error",
        "initial=torch.zeros_like(state.accumulated_error)",
        "runtime/test_foresight.py",
        "decisions_are_the_same and batch",
    ),
    Mutant(
        "last blocks counted once",
        "reports/records.py",
        "num_blocks + config.last_blocks if",
        "num_blocks if",
        "bench/test_search.py",
        "other_policies and dbcache",
    ),
    Mutant(
        "adapters' scales left as tensors",
        "runtime/weights.py",
        "layer.scaling[name] = number",
        "layer.scaling[name] = _",
        "pipelines/test_weights.py",
        "rescaled_within and compiled",
    ),
    Mutant(
        "a checkpoint without the lag",
        "sampling/checkpoint.py",
        "for name, tensor in flatten(key, part)}",
        'for name, tensor in flatten(key, part) if not name.endswith(".lag")}',
        "sampling/test_checkpoint.py",
        "never_stopped",
    ),
    # Ranks.
    Mutant(
        "errors not summed over tokens",
        RANKS,
        "over_tokens=lambda sums: all_sum(sums, whole)",
        "over_tokens=lambda sums: sums",
        "parallel/test_exchange.py",
    ),
    Mutant(
        "errors not summed over branches",
        RANKS,
        "over_branches=lambda errors: all_sum(errors, cfg)",
        "over_branches=lambda errors: errors",
        "parallel/test_exchange.py",
    ),
    Mutant(
        "gates sum over branches",
        RANKS,
        "sums if cfg.rank == 0 else torch.zeros_like(sums)",
        "sums",
        "parallel/test_exchange.py",
    ),
    Mutant(
        "every rank goes by an error of its own",
        RANKS,
        "adopt_error=lambda error: _of_first(error, layout.replica)",
        "adopt_error=lambda error: error",
        "parallel/test_exchange.py",
    ),
    Mutant(
        "padding is seen",
        "functional/ranks/sharding.py",
        "if not (lengths.txt_seq % ranks.size or lengths.img_seq % ranks.size):",
        "if lengths:",
        PARALLEL_TESTS,
        "what_one_process and ulysses and ring",
    ),
    Mutant(
        "a ring's weights exchanged",
        "functional/ranks/attention.py",
        "output.to(torch.float32) * share + other.to(torch.float32) * other_share",
        "output.to(torch.float32) * other_share + other.to(torch.float32) * share",
        "functional/ranks/test_sequence_parts.py",
    ),
    Mutant(
        "a ring hides its own padding at every hop",
        "functional/ranks/attention.py",
        "(ring.rank + hop) % ring.size",
        "(ring.rank + 0 * hop) % ring.size",
        PARALLEL_TESTS,
        "what_one_process and ulysses and ring",
    ),
    # Where a step begins.
    Mutant("a forecast bears any jump", CONTINUITY, "_REACH = 2.0", "_REACH = 1e9", CONTINUITY_TESTS),
    Mutant("guidance is a leap", CONTINUITY, "square - _ratio(along.square(), size)", "square + 0 * along", CONTINUITY_TESTS),
    Mutant("another noise level is the same", CONTINUITY, "_SAME_SIGMA = 1e-5", "_SAME_SIGMA = 9.0", CONTINUITY_TESTS),
    Mutant(
        "a sample that is elsewhere keeps its history",
        CONTINUITY,
        "restart(branch.state, is_astray)",
        "restart(branch.state, is_astray & False)",
        "pipelines/test_continuity.py",
        "change_places or begins_anew_alone",
    ),
)
