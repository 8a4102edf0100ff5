"""Schedulers whose step is Euler's over their noise levels: x + (sigma_next - sigma) v."""

from diffusers import FlowMatchEulerDiscreteScheduler, MiniMaxH3Scheduler

# The second is one family's, whose models return -v: x + (sigma - sigma_next) (-v).
EULERS = (FlowMatchEulerDiscreteScheduler, MiniMaxH3Scheduler)
