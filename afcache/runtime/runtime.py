"""The one mutable cell: what a bound transformer holds between calls."""

import contextlib
import dataclasses
import weakref
from collections.abc import Callable
from typing import Any

import torch
from diffusers.utils import logging
from torch import Tensor

from afcache.functional.initial import init_state, solo
from afcache.functional.plans import schedule_steps
from afcache.functional.ranks.step import parallel_forward, parallel_full_forward
from afcache.functional.state import CacheState, StepRecord
from afcache.functional.step import cached_forward, full_forward
from afcache.functional.update import follow
from afcache.models.flux1 import architecture as flux1
from afcache.models.flux1.checks import check_blocks, check_context, check_transformer
from afcache.parallel.groups import ParallelContext, check_same_task, check_votes, is_lost_connection, lost_rank
from afcache.runtime.compiled import CompiledStep, CompileOptions
from afcache.runtime.controls import controls_of, watch
from afcache.runtime.foresight import Foresight
from afcache.runtime.history import history_writer
from afcache.runtime.noise_floor import measure_noise_floor
from afcache.runtime.scheduler import ScheduledStep, Served, check_scheduler, check_sigmas, correction_holds, read_step
from afcache.runtime.trajectory import (
    CONDITIONING,
    Branch,
    Call,
    Trajectory,
    check_conditioning,
    couple,
    describe,
    is_new,
    learn_guidance,
    message_sizes,
    start_clock,
    steer,
    weights,
)
from afcache.runtime.weights import Weights, check_layers
from afcache.settings.config import CacheConfig

logger = logging.get_logger(__name__)
# Diffusers' FLUX pipelines have two; a runaway count means that the scheduler is not driven.
_MAX_BRANCHES = 4
# Of each branch of an image; the guards of later ones could only repeat themselves.
_GUARDED_CALLS = 2


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
        self.decides_ahead = decides_ahead
        self.is_bypassed = False
        self._trajectories: weakref.WeakKeyDictionary[Any, Trajectory] = weakref.WeakKeyDictionary()
        self._compiler = compiler
        self._transformer = transformer
        self._served: list[Served] = []
        self._steps: dict[tuple[bool, Any, bool], CompiledStep] = {}
        self._context: tuple[weakref.ref[Tensor], int] | None = None
        self._weights = Weights(transformer)
        self._measured_floor: float | None = None
        self._scales: tuple[Any, Tensor] | None = None
        self._has_warned = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "Runtime":
        """A copied transformer gets a runtime of its own: same settings, no trajectory, the copied pipelines."""
        settings = (self.config, self.options, self._compiler, self.parallel)
        twin = Runtime(memo[id(self._transformer)], *settings, decides_ahead=self.decides_ahead)
        memo[id(self)] = twin
        for pipe in self.pipes():
            twin.serve(memo.get(id(pipe), pipe))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "a cached transformer cannot be pickled. Use save_pretrained, or call afcache.restore_pipeline(pipe) first."
        )

    def serve(self, pipe: Any) -> None:
        """Read the scheduler of this pipeline, too. Pipelines made by `from_pipe` share the transformer."""
        if all(known is not pipe for known in self.pipes()):
            self._served.append(Served(pipe))
        watch([pipe])

    def pipes(self) -> list[Any]:
        """The living pipelines that are served."""
        return [served.pipe for served in self._served if served.pipe is not None]

    def last_trajectory(self, pipe: Any) -> Trajectory | None:
        """What the pipeline's present scheduler ran last."""
        return self._trajectories.get(pipe.scheduler)

    def forward(self, inputs: flux1.FluxInputs) -> Tensor:
        """One transformer call: find its place in the schedule, decide, compute or forecast, keep the state.

        Raises:
            RuntimeError: the timestep fits no schedule of the served pipelines.
            NotImplementedError: the transformer or the scheduler changed into something unsupported.

        """
        inputs = self._scale_prompts(flux1.split_context(inputs, self._context_length(inputs.img_ids)))
        scheduler, step = self._locate(inputs.timestep)
        trajectory = self._trajectories.get(scheduler)
        shape = inputs.hidden_states.shape
        if trajectory is None or is_new(trajectory, step, shape):
            trajectory = self._start(scheduler, step, inputs)
        if shape != trajectory.shape:
            raise RuntimeError(
                f"hidden_states changed from {tuple(trajectory.shape)} to {tuple(shape)} within one trajectory. Call "
                "scheduler.set_timesteps before sampling another shape."
            )
        if step.index != trajectory.index:
            trajectory.index, trajectory.calls_at_index = step.index, 0
            self._forget_other_weights(trajectory, inputs)
        branch_index = trajectory.calls_at_index
        if branch_index == _MAX_BRANCHES:
            raise RuntimeError(
                f"transformer was called {branch_index + 1} times at step {step.index}, more than guidance has branches "
                f"({_MAX_BRANCHES}). Call scheduler.step after each prediction, or use afcache.restore_pipeline(pipe)."
            )
        started = start_clock(inputs.hidden_states.device)
        try:
            velocity, record = self._take(inputs, trajectory, branch_index)
        except BaseException as error:
            del self._trajectories[scheduler]
            if self.parallel is not None and is_lost_connection(error):
                raise lost_rank(self.parallel, f"at step {step.index}") from error
            raise
        elapsed = started()
        trajectory.calls_at_index += 1
        if trajectory.velocities is None or branch_index == 0:
            trajectory.calls.append(Call(step.index, branch_index, record, elapsed))
        return velocity

    def _take(self, inputs: flux1.FluxInputs, trajectory: Trajectory, branch_index: int) -> tuple[Tensor, StepRecord | None]:
        """The velocity of one call, alone or together with other ranks."""
        if self.parallel is None:
            return self._take_alone(inputs, trajectory, branch_index)
        is_first = trajectory.index == trajectory.first_index
        # Guidance scales show at the second step, and that a rank has a branch more than others.
        is_second = trajectory.index == trajectory.first_index + 1 and branch_index == 0
        if is_first or is_second or (self.parallel.layout.checks and branch_index == 0):
            check_same_task(self.parallel, describe(inputs, trajectory, self.config, branch_index))
        if self.parallel.splits_guidance and is_first:
            trajectory.conditioning.append({name: getattr(inputs, name) for name in CONDITIONING})
        elif self.parallel.splits_guidance:
            return self._take_split(self.parallel, inputs, trajectory, branch_index)
        velocity, record = self._take_alone(inputs, trajectory, branch_index)
        check_votes(self.parallel, record, trajectory.index)
        return velocity, record

    def _take_alone(
        self, inputs: flux1.FluxInputs, trajectory: Trajectory, branch_index: int
    ) -> tuple[Tensor, StepRecord | None]:
        """One call for one guidance branch."""
        if self.config.policy == "none":
            with self._traceable():
                return self._only(self._step(trajectory)(inputs)), None
        return self._cached(inputs, trajectory, branch_index)

    def _only(self, velocity: Tensor) -> Tensor:
        """The velocity of a call in which all ranks computed the same guidance branch."""
        return velocity if self.parallel is None else velocity[0]

    def _take_split(
        self, parallel: ParallelContext, inputs: flux1.FluxInputs, trajectory: Trajectory, branch_index: int
    ) -> tuple[Tensor, StepRecord | None]:
        """One call for all guidance branches: this rank computes its own, and the others' velocities come with it.

        What a branch is conditioned on was seen at the first step, at which every rank computed all branches.
        """
        check_conditioning(trajectory, inputs, branch_index)
        if branch_index > 0:
            assert trajectory.velocities is not None
            return trajectory.velocities[branch_index], None
        rank = parallel.layout.cfg.rank
        # Latents, time and a ControlNet's residuals are the present ones; diffusers gives both branches the same.
        mine = inputs._replace(**trajectory.conditioning[rank])
        if self.config.policy == "none":
            with self._traceable():
                velocities, record = self._step(trajectory)(mine), None
        else:
            learn_guidance(trajectory, inputs.hidden_states)
            branch = trajectory.branches[rank if len(trajectory.branches) > 1 else 0]
            trajectory.branches = [branch]
            coupling = trajectory.alone._replace(weight=weights(trajectory)[rank])
            schedule = trajectory.schedule[trajectory.index - trajectory.first_index]
            steer(branch, mine, controls_of(self.pipes()))
            arguments = (mine, branch.state, schedule, coupling)
            velocities, branch.state, record = self._run(branch, trajectory, arguments)
        check_votes(parallel, record, trajectory.index)
        trajectory.velocities = velocities
        return velocities[0], record

    def _locate(self, timestep: Tensor) -> tuple[Any, ScheduledStep]:
        """The scheduler that is running, and the step it is at.

        One scheduler is the rule. With several, those whose present step fits the timestep qualify; a schedule that was not
        seen before comes first: it is about to start.
        """
        schedulers = list({id(served.scheduler): served.scheduler for served in self._served}.values())
        found: list[tuple[bool, Any, ScheduledStep]] = []
        for scheduler in schedulers:
            check_scheduler(scheduler, forecasts=self.config.policy != "none")
            trajectory = self._trajectories.get(scheduler)
            is_known = trajectory is not None and trajectory.timesteps is scheduler.timesteps
            # Reading the timestep waits for the device, so accelerators verify at a trajectory's start only.
            verify = timestep.device.type == "cpu" or len(schedulers) > 1 or not is_known
            step = read_step(scheduler, timestep, verify=verify)
            if step is not None:
                found.append((is_known, scheduler, step))
        if not found:
            value = float(timestep.flatten()[0]) * 1000
            raise RuntimeError(
                f"timestep {value:.4g} does not fit the present step of pipe.scheduler"
                f" ({', '.join(type(s).__name__ for s in schedulers)}). If another pipeline with its own scheduler shares "
                "this transformer, call afcache.compile_pipeline on that pipeline too; if you call the transformer yourself, "
                "drive pipe.scheduler, or use afcache.restore_pipeline(pipe) first."
            )
        return min(found, key=lambda candidate: candidate[0])[1:]

    def _start(self, scheduler: Any, step: ScheduledStep, inputs: flux1.FluxInputs) -> Trajectory:
        check_transformer(self._transformer)
        check_blocks(self._transformer)
        if self.options.enabled:
            check_layers(self._transformer)
        self._weights.look()
        watch(self.pipes())
        check_sigmas(step.sigmas[step.index :])
        corrects = self.config.correction and correction_holds(scheduler)
        if self.config.correction and not corrects and not self._has_warned and self.config.policy != "none":
            self._has_warned = True
            logger.warning(
                f"The catch-up correction is off: it assumes Euler's step, and {type(scheduler).__name__} takes another. "
                "Caching itself stays on; pass CacheConfig(correction=False) to silence this."
            )
        self._check_context(inputs)
        sigmas = step.sigmas.to(inputs.hidden_states.device, torch.float32)
        schedule = schedule_steps(sigmas[step.index :], self.config, noise_floor=self._noise_floor(inputs))
        trajectory = Trajectory(
            timesteps=step.timesteps,
            sigmas=sigmas,
            schedule=schedule,
            alone=solo(inputs.hidden_states.shape[0], groups=self.config.num_groups, device=sigmas.device),
            first_index=step.index,
            shape=inputs.hidden_states.shape,
            corrects=corrects,
            kernel_name=flux1.attention_backend(self._transformer),
            adapted=self._weights.adapted(),
            num_blocks=flux1.num_blocks(self._transformer),
            sizes=None if self.parallel is None else message_sizes(self._transformer, inputs),
            foresight=Foresight(self.config, schedule) if self.decides_ahead else None,
        )
        self._trajectories[scheduler] = trajectory
        return trajectory

    def _check_context(self, inputs: flux1.FluxInputs) -> None:
        check_context(inputs, self.config)
        if inputs.context is not None and self.parallel is not None and self.parallel.layout.sequence.whole.size > 1:
            raise NotImplementedError(
                "reference images (Kontext) cannot be shared among the ranks of a sequence yet. Use cfg_degree or data_degree "
                "instead of ulysses_degree and ring_degree."
            )

    def _noise_floor(self, inputs: flux1.FluxInputs) -> float | None:
        """What rounding alone changes, measured once where the settings leave it open and weights are quantised."""
        asks = self.config.noise_floor is None and self.config.policy == "adaptive" and self.parallel is None
        if not asks or not self._weights.is_quantised:
            return None
        if self._measured_floor is None:
            like = inputs.hidden_states
            self._measured_floor = measure_noise_floor(self._transformer, dtype=like.dtype, device=like.device)
        return self._measured_floor

    def _cached(self, inputs: flux1.FluxInputs, trajectory: Trajectory, branch_index: int) -> tuple[Tensor, StepRecord]:
        schedule = trajectory.schedule[trajectory.index - trajectory.first_index]
        if branch_index == len(trajectory.branches):
            trajectory.branches.append(Branch(self._init_state(inputs)))
        branch = trajectory.branches[branch_index]
        steer(branch, inputs, controls_of(self.pipes()))
        if branch_index == 0:
            learn_guidance(trajectory, inputs.hidden_states)
        coupling = couple(trajectory, branch_index, self.config)
        arguments = (inputs, branch.state, schedule, coupling)
        velocity, branch.state, record = self._run(branch, trajectory, arguments)
        velocity, branch.is_known = self._only(velocity), True
        if branch_index == 0:
            trajectory.coupling = follow(coupling, record)
        if trajectory.index == trajectory.first_index:
            trajectory.first_latents, branch.velocity = inputs.hidden_states, velocity
        return velocity, record

    def _scale_prompts(self, inputs: flux1.FluxInputs) -> flux1.FluxInputs:
        """Scales of image prompts as a tensor: they may change at every step, and as numbers each would be one graph more."""
        if not inputs.image_prompts:
            return inputs
        device = inputs.hidden_states.device
        key = (flux1.image_prompt_scales(self._transformer), device)
        if self._scales is None or self._scales[0] != key:
            self._scales = (key, torch.tensor(key[0], dtype=torch.float32, device=device))
        return inputs._replace(image_prompt_scales=self._scales[1])

    def _context_length(self, img_ids: Tensor) -> int:
        """Tokens of reference images, read once for each tensor of positions: pipelines make one for an image."""
        if self._context is None or self._context[0]() is not img_ids:
            self._context = (weakref.ref(img_ids), flux1.context_length(img_ids))
        return self._context[1]

    def _init_state(self, inputs: flux1.FluxInputs) -> CacheState:
        batch, img_seq, _ = inputs.hidden_states.shape
        dtype, device = inputs.hidden_states.dtype, inputs.hidden_states.device
        dim = self._transformer.inner_dim
        return init_state(
            batch,
            img_seq,
            dim,
            config=self.config,
            txt_seq=flux1.prefix_length(inputs),
            num_blocks=flux1.num_blocks(self._transformer),
            shards=1 if self.parallel is None else self.parallel.layout.sequence.whole.size,
            dtype=dtype,
            device=device,
        )

    def _forget_other_weights(self, trajectory: Trajectory, inputs: flux1.FluxInputs) -> None:
        """Start again where a callback has switched or rescaled adapters: the history is another model's."""
        adapted = self._weights.adapted()
        if adapted == trajectory.adapted:
            return
        trajectory.adapted = adapted
        for branch in trajectory.branches:
            branch.forget(self._init_state(inputs))

    def _run(self, branch: Branch, trajectory: Trajectory, arguments: tuple[Any, ...]) -> Any:
        """A branch's next call: with guards for the first two, the second of which meets a state of our own."""
        branch.calls += 1
        with self._traceable():
            step = self._step(trajectory)
            if branch.calls <= _GUARDED_CALLS:
                return step(*arguments)
            if branch.settled is None:
                branch.settled = step.without_guards(*arguments)
            return branch.settled(*arguments)

    def _traceable(self) -> contextlib.AbstractContextManager[None]:
        return self._weights.traceable() if self.options.enabled else contextlib.nullcontext()

    def _step(self, trajectory: Trajectory) -> CompiledStep:
        """The forward for the trajectory's scheduler, attention backend and kind of weights, compiled once for each."""
        key = (trajectory.corrects, trajectory.kernel_name, self._weights.has_subclasses)
        if key not in self._steps:
            self._steps[key] = self._build(trajectory.corrects)
        return self._steps[key]

    def _build(self, corrects: bool) -> CompiledStep:
        transformer, kernel = self._transformer, flux1.attention_kernel(self._transformer)
        config = dataclasses.replace(self.config, correction=corrects)
        options: dict[str, Any] = {"config": config, "writer": history_writer(self.options)}
        model: dict[str, Any] = {"architecture": flux1.FLUX, "kernel": kernel}
        forward, forward_in_full = cached_forward, full_forward
        if self.parallel is not None:
            forward, forward_in_full = parallel_forward, parallel_full_forward
            model["layout"] = self.parallel.layout

        def step(inputs: Any, state: Any, schedule: Any, coupling: Any) -> Any:
            return forward(transformer, inputs, state, schedule, coupling, **model, **options)

        def uncached(inputs: Any) -> Any:
            return forward_in_full(transformer, inputs, **model)

        function: Any = uncached if config.policy == "none" else step
        how = dataclasses.replace(self.options, opens_subclasses=self._weights.has_subclasses)
        return CompiledStep(function, self._compiler, how)
