"""How latents and outputs are joined where they are no flow's: processes that keep the variance of the latents.

    x = alpha x_0 + s n,  alpha^2 + s^2 = 1,  phi = arctan(s / alpha)

| the model predicts | m | x after a step to phi' (DDIM) | the noise that x and m mean | dx / d phi |
|---|---|---|---|---|
| "epsilon" | n | (alpha' / alpha) x + (s' - s alpha' / alpha) m | m | (m - s x) / alpha |
| "v_prediction" | alpha n - s x_0 | cos(phi - phi') x - sin(phi - phi') m | x cos(tau - phi) + m sin(tau - phi) | m |

No variable makes that Euler's step, but it is linear in x and m, which is all that the cache needs: `kept` and `added` are what
1 and sigma' - sigma are to a flow. Both kinds of models walk the same path, so both are held to the same: what is measured is
the error of dx / d phi, relative to it. An error of the noise is alpha times as large: little where nearly all is noise.

What a history keeps of "v_prediction" is the same point beyond the noise as of a flow (`afcache.functional.target`), on the
circle through x and m: (1 - 1.1) x_0 + 1.1 n. Of "epsilon" it is the noise itself: x_0 = (x - s m) / alpha blows rounding up.

Reference:
    Song, Meng, Ermon, 2021, DDIM, arXiv 2010.02502. Salimans, Ho, 2022, arXiv 2202.00512: m = dx / d phi.
"""

from typing import NamedTuple

import torch

from afcache._typing import Latents, Level, Scalar, Setting, Velocity, typed
from afcache.functional.shapes import per_sample


class Process(NamedTuple):
    """What a step does that is no flow's; float32, 0-d or `[batch]`.

    Attributes:
        kept: of the latents, after the step to first order.
        added: times the model's output.
        noise_of_latents: of the latents, in the noise that the history keeps.
        noise_of_output: times the model's output; not 0.
        drift: of the latents, in the direction of the path, m + drift x.
        scale: of the output's error, where that of dx / d phi is 1.

    """

    kept: Setting
    added: Setting
    noise_of_latents: Setting
    noise_of_output: Setting
    drift: Setting
    scale: Setting


@typed
def moved(latents: Latents, output: Velocity, length: Level, *, process: Process | None) -> Velocity:
    """How far a step goes, to first order: x' - x, float32, fresh.

    Args:
        latents: x.
        output: m; a flow's is its velocity.
        length: sigma' - sigma; 0-d, or `[batch]`.
        process: None of a flow.

    """
    output = output.to(torch.float32)
    if process is None:
        return per_sample(length, output) * output
    return per_sample(process.kept - 1, output) * latents.to(torch.float32) + per_sample(process.added, output) * output


@typed
def direction(output: Velocity, latents: Latents, *, process: Process) -> Velocity:
    """Where the path leads at latents x, but for its length, float32: an output's error counts relative to this.

    Args:
        output: m.
        latents: x.
        process: of the step.

    """
    return output.to(torch.float32) + per_sample(process.drift, output) * latents.to(torch.float32)


@typed
def mean_output(before: Latents, after: Latents, length: Scalar, *, process: Process | None) -> tuple[Velocity, Scalar]:
    """The output that a first-order step would have needed to go where one went, and what it was multiplied with.

    Args:
        before, after: latents x and x' on either side of the step.
        length: sigma' - sigma; 0-d.
        process: None of a flow.

    """
    start, end = before.to(torch.float32), after.to(torch.float32)
    if process is None:
        return (end - start) / length, length
    return (end - process.kept * start) / process.added, process.added


def from_numbers(steps: list[tuple[float, ...]], device: torch.device) -> list[Process]:
    """The process of each step, on a device; every tensor has memory of its own.

    Args:
        steps: of each the numbers of a process, in the order of its fields.
        device: of the latents.

    """
    rows = torch.tensor(steps, dtype=torch.float32, device=device).reshape(-1, len(Process._fields))
    return [Process(*(value.clone() for value in row.unbind())) for row in rows.unbind()]
