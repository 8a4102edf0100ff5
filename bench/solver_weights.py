"""How much each output weighs in the final latents under solvers that mix several, beside its step's length in sigma.

    python -m bench.solver_weights

Error control counts an error by the length of its step. Under Euler's step that is what the output weighs at the end; here is
by how much it is not, under others. No model is run.
"""

import statistics
from collections.abc import Callable
from typing import Any

from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from afcache.functional.solver_response import WINDOW
from afcache.runtime.scheduler import ScheduledStep
from afcache.runtime.solver import response_of
from bench.record.recording import write_result

FLOW: dict[str, Any] = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
SCHEDULERS: dict[str, Callable[[], Any]] = {
    "FlowMatchEuler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "DPM++ 2M": lambda: DPMSolverMultistepScheduler(**FLOW),
    "UniPC": lambda: UniPCMultistepScheduler(**FLOW),
}


def weights(scheduler: Any, steps: int) -> list[float]:
    """Of every output in the final latents, over the length of its step.

    Args:
        scheduler: over flow sigmas.
        steps: of the schedule; as many as a response remembers, at most.

    """
    assert steps <= WINDOW
    scheduler.set_timesteps(steps)
    response = response_of(scheduler, ScheduledStep(scheduler.timesteps, scheduler.sigmas, 0))
    assert response is not None
    return (response[-1, :steps].flip(0) / scheduler.sigmas.diff()).tolist()


def main() -> None:
    """Write bench/results."""
    rows = []
    for steps in (28, 50):
        for name, make in SCHEDULERS.items():
            found = weights(make(), steps)
            near = sum(abs(weight - 1) <= 0.1 for weight in found)
            rows.append(
                {
                    "scheduler": name,
                    "steps": steps,
                    "least": min(found),
                    "median": statistics.median(found),
                    "largest": max(found),
                    "within a tenth of 1": near,
                    "the last three": ", ".join(f"{weight:.2f}" for weight in found[-3:]),
                }
            )
    notes = ["What an output weighs in the final latents, over the length of its step in sigma; sigmas shifted by 3."]
    print(write_result("solver_weights", "What outputs weigh under solvers", rows, notes=notes))


if __name__ == "__main__":
    main()
