"""A transformer that nobody has described: what its pipeline does is found out from its first step, or it is refused."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers.utils import logging
from torch import Tensor

from afcache.functional.process import mean_output
from afcache.functional.state import StepSchedule
from afcache.models.family import Family
from afcache.models.hosted.architecture import HostInputs
from afcache.models.hosted.call import Reader
from afcache.models.hosted.conventions import Conventions
from afcache.models.hosted.family import hosted_family

logger = logging.get_logger(__name__)
# How far the scheduler's step may be from what the outputs make of it, relative to it.
_EXPLAINED = 1e-3
_WAY_OUT = "Call afcache.restore_pipeline(pipe) to run without a cache; docs/adding-a-family.md says how to describe a family"


def _only(result: Any) -> Any:
    """The one output of a forward.

    Raises:
        NotImplementedError: there are several, and nobody knows what the others are.

    """
    if isinstance(result, tuple) and len(result) != 1:
        raise NotImplementedError(
            f"the transformer returns {len(result)} outputs; of a family that was never seen it must be one tensor. {_WAY_OUT}."
        )
    return result if isinstance(result, Tensor) else result[0]


_CONVENTIONS = Conventions(shares=True, writes_latents=True, output=_only, is_flow=None)


class UnseenReader(Reader):
    """Reads calls as most pipelines make them, until a step of the scheduler has confirmed that these do.

    Attributes:
        is_confirmed: whether one has.

    """

    def __init__(self, transformer: Any) -> None:
        super().__init__(transformer, _CONVENTIONS)
        self.is_confirmed = False

    def _ask(self, inputs: HostInputs, shape: torch.Size, host: Callable[..., Any]) -> Tensor:
        output = _only(host(**inputs.arguments, return_dict=False))
        if not isinstance(output, Tensor) or output.shape != shape:
            found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise NotImplementedError(
                f"the transformer returns {found} for hidden_states of {tuple(shape)}; of a family that was never seen both "
                f"must have the same shape. {_WAY_OUT}."
            )
        return (self.sign * output).contiguous()

    def confirm(self, before: Tensor, after: Tensor, schedule: StepSchedule, velocities: list[Tensor]) -> bool:
        """See, once, that the scheduler's step is a combination of the outputs.

        Args:
            before, after: latents on either side of it.
            schedule: of the step.
            velocities: what the calls of that step were answered, of the shape of the latents.

        Returns:
            whether outputs are turned round from now on.

        Raises:
            NotImplementedError: it is not, so that nothing is known of what may be forecast.
        Cost:
            waits for the device.

        """
        if self.is_confirmed:
            return False
        taken, length = mean_output(before, after, schedule.sigma_next - schedule.sigma, process=schedule.process)
        step = taken.double().flatten()
        outputs = torch.stack([velocity.double().flatten() for velocity in velocities], dim=1)
        weights = torch.linalg.lstsq(outputs, step[:, None]).solution
        missed = float((outputs @ weights - step[:, None]).norm() / step.norm())
        rounding = 4 * torch.finfo(after.dtype).eps * float(before.double().norm() / (length.abs() * step.norm()))
        if not missed <= _EXPLAINED + rounding:
            raise NotImplementedError(
                f"the scheduler's step is not what the transformer's {len(velocities)} outputs make of it: {missed:.2g} of its "
                f"length is left, where {_EXPLAINED:g} is allowed. A family that was never seen is cached only where outputs "
                f"are velocities. {_WAY_OUT}."
            )
        self.is_confirmed, is_turned = True, float(weights.sum()) < 0
        self.sign *= -1 if is_turned else 1
        logger.warning(
            f"{type(self._transformer).__name__} was never seen before. The scheduler's first step is explained by its outputs "
            f"within {missed:.1g}, so they are forecast as velocities."
        )
        return is_turned


def is_candidate(transformer: Any) -> bool:
    """Whether a transformer's forward takes what most do."""
    if not isinstance(transformer, torch.nn.Module):
        return False
    return {"hidden_states", "timestep"} <= set(inspect.signature(type(transformer).forward).parameters)


@functools.cache
def unseen_family(kind: type) -> Family:
    """The family of a transformer's class that nobody has described."""
    family = hosted_family("a family that was never seen", _CONVENTIONS, kind)
    calls = family.calls._replace(reader=UnseenReader, clock=None, confirm=UnseenReader.confirm)
    return family._replace(calls=calls, target="velocity")
