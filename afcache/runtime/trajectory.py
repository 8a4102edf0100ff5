"""One image's way through a schedule, as the runtime holds it between calls."""

import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from afcache.functional.decision import predict_error
from afcache.functional.error_control import infer_guidance
from afcache.functional.initial import state_bytes
from afcache.functional.model import Lengths
from afcache.functional.ranks.traffic import Sizes
from afcache.functional.state import CacheState, Coupling, StepRecord, StepSchedule
from afcache.functional.update import restart
from afcache.models.flux1.architecture import FluxInputs
from afcache.runtime.controls import Controls
from afcache.runtime.foresight import Foresight
from afcache.runtime.scheduler import ScheduledStep
from afcache.runtime.switches import Steering, is_switched, steering
from afcache.settings.config import CacheConfig

# What ranks have in common if they have the same guidance branches.
BRANCHES = "numbers of guidance branches (true_cfg_scale, negative prompts)"
# Inputs in which guidance branches differ.
CONDITIONING = ("encoder_hidden_states", "pooled_projections", "txt_ids", "image_prompts")


@dataclass
class Call:
    """One transformer call of a trajectory, as the report sees it.

    Attributes:
        step: position in the schedule.
        branch: 0 for the leader, 1 and up for other guidance branches.
        record: what the step did, or None under policy "none".
        elapsed: returns seconds; on CUDA it waits for the call's events.

    """

    step: int
    branch: int
    record: StepRecord | None
    elapsed: Callable[[], float]


@dataclass
class Branch:
    """What one guidance branch holds.

    Attributes:
        state: the present value.
        velocity: its velocity at the trajectory's first step; dropped once the guidance scale is known.
        calls: how many there were.
        settled: the compiled step without guards, once they have been checked often enough.
        steering: what steered its last call.
        is_known: whether it certainly has a history.

    """

    state: CacheState
    velocity: Tensor | None = None
    calls: int = 0
    settled: Callable[..., Any] | None = None
    steering: Steering | None = None
    is_known: bool = False

    def forget(self, state: CacheState) -> None:
        """Start again with another state, whose next calls check all guards."""
        self.state, self.calls, self.settled, self.is_known = state, 0, None, False


@dataclass
class Trajectory:
    """One image's (or batch's) way through a schedule.

    Attributes:
        timesteps: the scheduler's tensor, whose identity names the trajectory.
        sigmas: noise levels on the model's device; float32.
        schedule: the steps from `first_index` on.
        alone: the leading branch's coupling where there are no others.
        first_index: where in the schedule it started.
        shape: of the transformer's hidden_states.
        corrects: whether the catch-up correction is on.
        kernel_name: attention backend that the trajectory started with.
        adapted: what adapters did to the model at the last step.
        index: the present step.
        calls_at_index: transformer calls at this step so far.
        branches: guidance branches in order of their first call.
        coupling: what the leading branch decided at this step, for those that follow.
        guidance_scale: true CFG scale per sample, NaN where unknown; None without two branches.
        first_latents: the first step's input, until the guidance scale is known.
        conditioning: in what the first step's inputs of every branch differ, where other ranks compute some of them.
        velocities: of all branches at this step, where one call computed them for all.
        calls: every call, for the report.
        num_blocks: blocks that one full call evaluates.
        sizes: of the messages that ranks exchange; None alone.
        foresight: the decisions that the host knows beforehand; None where each step's is read.

    """

    timesteps: Tensor
    sigmas: Tensor
    schedule: list[StepSchedule]
    alone: Coupling
    first_index: int
    shape: torch.Size
    corrects: bool
    kernel_name: Any = None
    adapted: tuple[Any, ...] = ()
    index: int = -1
    calls_at_index: int = 0
    branches: list[Branch] = field(default_factory=list)
    coupling: Coupling | None = None
    guidance_scale: Tensor | None = None
    first_latents: Tensor | None = None
    conditioning: list[dict[str, Any]] = field(default_factory=list)
    velocities: Tensor | None = None
    calls: list[Call] = field(default_factory=list)
    num_blocks: int = 0
    sizes: Sizes | None = None
    foresight: Foresight | None = None

    @property
    def bytes(self) -> int:
        """Memory of all branches' states."""
        return sum(state_bytes(branch.state) for branch in self.branches)


def is_new(trajectory: Trajectory, step: ScheduledStep, shape: torch.Size) -> bool:
    """A schedule made anew, or one that is walked again from an earlier step, or begun again in another shape."""
    is_restarted = step.index < trajectory.index or (step.index == trajectory.first_index and shape != trajectory.shape)
    return step.timesteps is not trajectory.timesteps or is_restarted


def steer(branch: Branch, inputs: FluxInputs, controls: Controls) -> None:
    """Start a branch again where it is steered otherwise than at its last call: its history is another field's."""
    before, branch.steering = branch.steering, steering(inputs, controls)
    if before is None:
        return
    if before.structure != branch.steering.structure:
        branch.calls, branch.settled = 0, None
    switched = is_switched(before, branch.steering)
    if switched is not None:
        branch.state, branch.is_known = restart(branch.state, switched), False


def learn_guidance(trajectory: Trajectory, latents: Tensor) -> None:
    """At the second step: infer the guidance scale from the first step that the scheduler took."""
    if trajectory.first_latents is None or trajectory.index == trajectory.first_index:
        return
    if len(trajectory.branches) == 2:
        first, second = (branch.velocity for branch in trajectory.branches)
        assert first is not None
        assert second is not None
        channels = first.shape[-1]
        before = trajectory.first_latents[..., :channels].to(torch.float32)
        sigma, sigma_next = trajectory.sigmas[trajectory.first_index], trajectory.sigmas[trajectory.first_index + 1]
        length = (sigma_next - sigma).abs()
        step = (latents[..., :channels].to(torch.float32) - before) / (sigma_next - sigma)
        rounding = torch.finfo(latents.dtype).eps * before.square().sum((1, 2)).sqrt() / length
        trajectory.guidance_scale = infer_guidance(step, first, second, rounding=rounding)
    trajectory.first_latents = None
    for branch in trajectory.branches:
        branch.velocity = None


def weights(trajectory: Trajectory) -> tuple[Tensor, Tensor]:
    """How much the error of the first and of any other guidance branch counts: |s| and |1 - s|; in full where s is unknown."""
    ones = trajectory.alone.weight
    scale = trajectory.guidance_scale
    if scale is None:
        return ones, ones
    is_known = torch.isfinite(scale)
    return torch.where(is_known, scale.abs(), ones), torch.where(is_known, (1 - scale).abs(), ones)


def couple(trajectory: Trajectory, branch_index: int, config: CacheConfig) -> Coupling:
    """How a branch decides: the first one for all, the others as it did."""
    if branch_index == 0:
        return _lead(trajectory, config)
    coupling = trajectory.coupling
    assert coupling is not None
    if trajectory.foresight is None:
        return coupling
    return trajectory.foresight.follow(coupling, is_known=trajectory.branches[branch_index].is_known)


def _lead(trajectory: Trajectory, config: CacheConfig) -> Coupling:
    """Gather what the leading branch needs to decide for all."""
    position = trajectory.index - trajectory.first_index
    leader, *followers = trajectory.branches
    coupling = trajectory.alone
    if followers:
        schedule = trajectory.schedule[position]
        others = sum(predict_error(branch.state, schedule, config=config) for branch in followers)
        weight, others_weight = weights(trajectory)
        coupling = coupling._replace(weight=weight, others_error=others_weight * others)
    if trajectory.foresight is None:
        return coupling
    states = [branch.state for branch in trajectory.branches]
    return trajectory.foresight.lead(position, coupling, states, weights(trajectory), is_known=leader.is_known)


def describe(inputs: FluxInputs, trajectory: Trajectory, config: CacheConfig, branch_index: int) -> dict[str, Any]:
    """What must be equal on all ranks that draw one image, by the names that a user knows; the same names for all inputs.

    A rank that has a guidance branch more than another is at its second branch while that one is at its second step.
    """
    is_later = trajectory.index > trajectory.first_index
    latents = "true_cfg_scale, callbacks or scheduler options" if is_later else "latents or seeds"
    residuals = [*inputs.controlnet_block_samples, *inputs.controlnet_single_block_samples]
    return {
        BRANCHES: 10 * (trajectory.index - trajectory.first_index) + branch_index,
        "prompts (encoder_hidden_states)": inputs.encoder_hidden_states,
        "prompts (pooled_projections)": inputs.pooled_projections,
        f"{latents} (hidden_states)": inputs.hidden_states,
        "image sizes (img_ids)": inputs.img_ids,
        "reference images (context)": 0.0 if inputs.context is None else inputs.context,
        "image prompts (IP-Adapters)": torch.cat([p.flatten() for p in inputs.image_prompts]) if inputs.image_prompts else 0.0,
        "image prompts (scales)": 0.0 if inputs.image_prompt_scales is None else inputs.image_prompt_scales,
        "ControlNets (their number of residuals)": len(residuals),
        "ControlNets (controlnet_block_samples)": residuals[0] if residuals and not is_later else 0.0,
        "guidance scales": 0.0 if inputs.guidance is None else inputs.guidance,
        "step counts (scheduler.sigmas)": trajectory.sigmas,
        "settings (CacheConfig)": zlib.crc32(repr(config).encode()),
        "adapters (LoRA, their scales)": zlib.crc32(repr(trajectory.adapted).encode()),
    }


def check_conditioning(trajectory: Trajectory, inputs: FluxInputs, branch_index: int) -> None:
    """Raise unless a guidance branch is conditioned on what it was at the first step.

    Raises:
        RuntimeError: there are fewer or more branches than at the first step, or one has another prompt.

    """
    branches = len(trajectory.conditioning)
    if branches != 2 or branch_index >= branches:
        raise RuntimeError(
            f"cfg_degree=2 shares out the two branches of true CFG, but the pipeline called the transformer {branches} times "
            "at its first step. Pass true_cfg_scale above 1 and a negative_prompt, or use cfg_degree=1."
        )
    before = trajectory.conditioning[branch_index]
    for name in CONDITIONING:
        now, then = getattr(inputs, name), before[name]
        if not _is_equal(now, then):
            raise RuntimeError(
                f"{name} of guidance branch {branch_index} changed at step {trajectory.index}, which cfg_degree=2 does not "
                "support: another rank computes the branch. Leave prompts alone in callbacks, or use cfg_degree=1."
            )


def message_sizes(transformer: Any, inputs: FluxInputs) -> Sizes:
    """What the messages of ranks that take this call together are made of."""
    settings = transformer.config
    return Sizes(
        batch=inputs.hidden_states.shape[0],
        lengths=Lengths(inputs.encoder_hidden_states.shape[1], inputs.hidden_states.shape[1]),
        heads=settings.num_attention_heads,
        head_dim=settings.attention_head_dim,
        channels=transformer.proj_out.out_features,
        element=inputs.hidden_states.element_size(),
    )


def _is_equal(now: Any, then: Any) -> bool:
    if isinstance(now, tuple):
        return len(now) == len(then) and all(map(_is_equal, now, then))
    return now is then or (isinstance(now, Tensor) and isinstance(then, Tensor) and torch.equal(now, then))


def start_clock(device: torch.device) -> Callable[[], Callable[[], float]]:
    """Start timing; call the result at the end to get a function that returns the seconds between."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()

        def stop_on_device() -> Callable[[], float]:
            end.record()

            def seconds() -> float:
                end.synchronize()
                return start.elapsed_time(end) / 1000

            return seconds

        return stop_on_device
    began = time.perf_counter()

    def stop() -> Callable[[], float]:
        elapsed = time.perf_counter() - began
        return lambda: elapsed

    return stop
