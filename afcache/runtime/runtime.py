"""The one mutable cell: what a bound transformer holds between calls."""

import threading
from collections.abc import Callable
from typing import Any

import torch
from diffusers.utils import logging
from torch import Tensor

from afcache.functional.initial import empty_trail, uncoupled, unled
from afcache.functional.plans import forced_steps, schedule_steps
from afcache.functional.ranks.traffic import Call as Messages
from afcache.functional.state import Coupling
from afcache.models.families import family_of
from afcache.models.family import CLOCKS, Call, Clock, Family
from afcache.parallel.agreement import is_lost_connection, lost_rank
from afcache.parallel.groups import ParallelContext
from afcache.runtime.clock import start_clock
from afcache.runtime.compiled import CompileOptions
from afcache.runtime.diffusion import is_diffusion, processes_of
from afcache.runtime.foresight import Foresight
from afcache.runtime.host import Host, sharing_of
from afcache.runtime.noise_floor import measure_noise_floor
from afcache.runtime.notes import Correction
from afcache.runtime.pipelines import Pipelines
from afcache.runtime.scheduler import ScheduledStep, check_sigmas, is_eulers, is_solver
from afcache.runtime.solver import response_of
from afcache.runtime.steps import Bound, Steps
from afcache.runtime.together import Together
from afcache.runtime.trajectories import Trajectories
from afcache.runtime.trajectory import Trajectory
from afcache.runtime.weights import Weights, check_layers
from afcache.settings.changes import for_each
from afcache.settings.config import CacheConfig

logger = logging.get_logger(__name__)


def check_model(transformer: Any, family: Family, options: CompileOptions) -> None:
    """Raise where a cached forward would not compute what the transformer does.

    Args:
        transformer: the host's.
        family: its family.
        options: how it is compiled; where its own forward runs, little can go wrong.

    Raises:
        NotImplementedError: naming what is not supported.

    """
    family.checks.cache(transformer)
    if options.keeps_host:
        return
    family.checks.transformer(transformer)
    family.checks.blocks(transformer)
    if options.enabled:
        check_layers(transformer)


class Runtime:
    """Binds settings to a transformer and threads the state through its calls.

    Args:
        transformer: the module whose forward it replaces.
        config: settings.
        options: how to compile.
        compiler: torch.compile; passed in because the pipeline module owns the only call to it.
        parallel: the processes that draw together; None draws alone.
        decides_ahead: whether decisions are read once a refresh (`afcache.runtime.foresight`).

    """

    def __init__(
        self,
        transformer: Any,
        config: CacheConfig,
        options: CompileOptions,
        compiler: Callable[..., Callable[..., Any]],
        parallel: ParallelContext | None = None,
        *,
        decides_ahead: bool = False,
    ) -> None:
        self.config = config
        self.options = options
        self.parallel = parallel
        self.decides_ahead = decides_ahead or options.keeps_host
        self.is_bypassed = False
        # What `afcache.using` asks for inside its block; read where an image begins.
        self.in_use: CacheConfig | tuple[CacheConfig, ...] | None = None
        self.family = family_of(transformer)
        self.reader = self.family.calls.reader(transformer)
        self._clock = self.family.calls.clock
        self.pipelines = Pipelines(self.family.calls.beside, is_flow=self.family.is_flow)
        self.trajectories = Trajectories()
        # Calls of several threads take turns.
        self._turn = threading.RLock()
        self._compiler = compiler
        self._transformer = transformer
        self._sharing = sharing_of(transformer)
        self._weights = Weights(transformer)
        layout = None if parallel is None else parallel.layout
        settings = (transformer, self.family, config, options, compiler)
        self.steps = Steps(*settings, layout=layout, weights=self._weights)
        self.host = Host(transformer, options) if options.keeps_host else None
        self._bound = Bound(self.family, config, parallel, self.steps, self._weights, self.pipelines.controls, self.host)
        self._measured_floor: float | None = None
        self._has_warned = False
        self._has_told = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "Runtime":
        """A copied transformer gets a runtime of its own: same settings, no trajectory, the copied pipelines."""
        settings = (self.config, self.options, self._compiler, self.parallel)
        twin = Runtime(memo[id(self._transformer)], *settings, decides_ahead=self.decides_ahead)
        memo[id(self)] = twin
        for pipe in self.pipelines.alive():
            twin.pipelines.add(memo.get(id(pipe), pipe))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "a cached transformer cannot be pickled. Use save_pretrained, or call afcache.restore_pipeline(pipe) first."
        )

    def last_trajectory(self, pipe: Any) -> Trajectory | None:
        """What the pipeline's present scheduler ran last."""
        return self.trajectories.last(pipe.scheduler)

    def check_sharing(self) -> None:
        """Raise where diffusers shares the transformer out otherwise than when it was compiled.

        Raises:
            NotImplementedError: it does.

        """
        if sharing_of(self._transformer) is not self._sharing:
            raise NotImplementedError(
                "transformer.enable_parallelism was called after compile_pipeline, so a cached forward would see a share of "
                "its inputs. Call afcache.compile_pipeline(pipe, ...) again: it takes the transformer as it is then."
            )

    def forward(self, call: Call) -> Tensor:
        """One transformer call: find its place in the schedule, decide, compute or forecast, keep the state.

        Raises:
            RuntimeError: the timestep fits no schedule of the served pipelines.
            NotImplementedError: gradients are asked for, or the transformer or the scheduler changed into something
                unsupported.

        """
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "gradient mode is on, and a cached forward has no gradient. Wrap the call in torch.no_grad(), or call "
                "afcache.restore_pipeline(pipe) before training."
            )
        with self._turn:
            return self._forward(call)

    def _forward(self, call: Call) -> Tensor:
        expects, forecasts = self.trajectories.expects, self.config.rule.is_cached
        places = self.pipelines.locate(call.timestep, self._clock_of(call), expects=expects, forecasts=forecasts)
        if call.placed is not None and forecasts:
            call = call.placed(*self.pipelines.levels(*places[0]))
        scheduler, step, trajectory = self.trajectories.find(call, places)
        if trajectory is None:
            call = call if call.again is None else call.again()
            trajectory = self._start(scheduler, step, call)
        trajectory.begin_call(call, step.index)
        if self.family.calls.confirm is not None:
            self._confirm(trajectory, call)
        stop = start_clock(call.latents.device)
        try:
            velocity, record, role = trajectory.take(call)
        except BaseException as error:
            self.trajectories.end(scheduler, trajectory)
            if self.parallel is not None and is_lost_connection(error):
                raise lost_rank(self.parallel, f"at step {step.index}") from error
            raise
        trajectory.note(record, role, stop())
        return velocity

    def _confirm(self, trajectory: Trajectory, call: Call) -> None:
        """At the first call of a step: see that the last one was what outputs make of it; what was turned is forgotten."""
        before, index = trajectory.latents_before, trajectory.index_before
        velocities = [velocity for branch in trajectory.branches for velocity in branch.velocities]
        if trajectory.calls_at_index or before is None or not velocities:
            return
        assert self.family.calls.confirm is not None
        schedule = trajectory.schedule[index - trajectory.first_index]
        if self.family.calls.confirm(self.reader, before, call.latents, schedule, velocities):
            trajectory.forget(call)

    def _clock_of(self, call: Call) -> Clock:
        """What the timestep counts: said by the family, or found out by the first call that leaves no doubt."""
        if self._clock is not None:
            return self._clock
        found = self.pipelines.find_clocks(call.timestep) or [CLOCKS[0]]
        self._clock = found[0] if len(found) == 1 else None
        return found[0]

    def _start(self, scheduler: Any, step: ScheduledStep, call: Call) -> Trajectory:
        latents, config, parallel = call.latents, self.config, self.parallel
        check_model(self._transformer, self.family, self.options)
        self._weights.inspect()
        self.pipelines.watch_controls()
        check_sigmas(step.sigmas[step.index :], is_flow=not is_diffusion(scheduler))
        shares_sequence = parallel is not None and parallel.layout.sequence.whole.size > 1
        self.family.checks.call(self.reader, config, shares_sequence=shares_sequence)
        sigmas = step.sigmas.to(latents.device, torch.float32)
        floor = self._noise_floor(latents.dtype, latents.device)
        # One for each image always: a number for all would be another graph.
        settings = for_each(config if self.in_use is None else self.in_use, latents.shape[0])
        correction, responses = self._correction(scheduler, step)
        walked = None if responses is None else responses[step.index :]
        processes = processes_of(scheduler, step.index, latents.device) if is_diffusion(scheduler) else None
        steps = {"noise_floor": floor, "each": settings, "responses": walked, "processes": processes}
        schedule = schedule_steps(sigmas[step.index :], config, **steps)
        kind = Trajectory if parallel is None else Together
        trajectory = kind(
            bound=self._bound,
            scheduled=step,
            sigmas=sigmas,
            schedule=schedule,
            settings=settings,
            alone=self._alone(latents),
            shape=latents.shape,
            correction=correction,
            kernel_name=None if self.host is not None else self.family.attention_backend(self._transformer),
            adapted=self._weights.adapted(),
            messages=None if parallel is None else self._messages(call),
            foresight=Foresight(config, schedule) if self.decides_ahead else None,
        )
        self.trajectories.begin(scheduler, trajectory)
        if step.index == (getattr(scheduler, "begin_index", None) or 0):
            self._tell_if_all_are_forced(len(schedule))
        return trajectory

    def _alone(self, latents: Tensor) -> Coupling:
        """The coupling of a branch without others."""
        config, parallel = self.config, self.parallel
        coupling = uncoupled(latents.shape[0], groups=config.num_groups, device=latents.device)
        if self.decides_ahead or (parallel is not None and not config.forecasts_output):
            # The host looks whether latents are where they should be.
            coupling = coupling._replace(trails=None)
        elif parallel is None or not parallel.splits_guidance:
            coupling = coupling._replace(trails=(empty_trail(latents.shape, device=latents.device),))
        is_led = config.forecasts_output and not (parallel is not None and parallel.splits_guidance)
        return unled(coupling, latents) if is_led else coupling

    def _correction(self, scheduler: Any, step: ScheduledStep) -> tuple[Correction, Tensor | None]:
        """How what forecasts leave out is returned, and the solver's response; one warning where it is not."""
        if not self.config.correction or not self.config.rule.is_cached:
            return "off", None
        if is_eulers(scheduler):
            return "step", None
        reason = "draws noise or was replaced"
        holds_shares = self.parallel is not None and not self.config.forecasts_output
        if is_solver(scheduler) and (holds_shares or self.config.layerwise is not None):
            reason = "is answered where processes forecast outputs (target='noise'), and without groups of blocks"
        elif is_solver(scheduler):
            response = response_of(scheduler, step)
            if response is not None:
                return "solver", response
            reason = "is not linear, not stable, or had begun before it was looked at"
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                f"The catch-up correction is off: {type(scheduler).__name__} {reason}. Caching itself stays on; pass "
                "CacheConfig(correction=False) to silence this."
            )
        return "off", None

    def _tell_if_all_are_forced(self, num_steps: int) -> None:
        """One warning where nothing can be saved, whatever is found; what was found is the report's to tell: it waits."""
        if self._has_told or not self.config.rule.is_cached or not all(forced_steps(self.config, num_steps)):
            return
        self._has_told = True
        logger.warning(
            f"All {num_steps} steps of this image are computed, and the cache saves nothing: of so few, these settings "
            "forecast none. Take more steps, or call afcache.restore_pipeline(pipe). This is said once."
        )

    def _messages(self, call: Call) -> Messages:
        """What ranks exchange at a call."""
        axes = self.family.architecture.axes
        assert axes is not None
        return Messages(call.latents.shape[0], axes.lengths(call.inputs), call.latents.element_size(), self.steps.sizes)

    def _noise_floor(self, dtype: torch.dtype, device: torch.device) -> float | None:
        """What rounding alone changes, measured once where the settings leave it open and weights are quantised."""
        asks = self.config.noise_floor is None and self.config.rule.is_error_controlled and self.parallel is None
        # Where the model keeps its own forward, ours may not be able to run it.
        if not asks or not self._weights.is_quantised or self.host is not None or self.family.calls.probe is None:
            return None
        if self._measured_floor is None:
            self._measured_floor = measure_noise_floor(self._transformer, self.family, dtype=dtype, device=device)
        return self._measured_floor
