"""What is drawn for an evaluation: how many steps, how guided, and how many samples of it at once."""

from typing import Any, NamedTuple

from bench.mini_flux.sampling import Prepared

# Samples of one batch: what fills a GPU, and what a CPU's caches hold.
AT_ONCE = {"cuda": 4096, "cpu": 128}


class Setting(NamedTuple):
    """How long and how guided."""

    steps: int
    cfg: float

    def __str__(self) -> str:
        return f"{self.steps} steps, CFG {self.cfg:g}"


def repeat(problem: Prepared, times: int) -> Prepared:
    """The same seeds several times over, one after the other."""
    batched = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "guidance")

    def longer(inputs: Any) -> Any:
        given = {name: getattr(inputs, name) for name in batched}
        return inputs._replace(
            **{name: value.repeat(times, *[1] * (value.ndim - 1)) for name, value in given.items() if value is not None}
        )

    return problem._replace(branches=tuple(map(longer, problem.branches)))
