"""The learning rate over time: linear warm-up, then constant, linear or cosine decay. Pure numbers, no state."""

from __future__ import annotations

import math

SCHEDULES = ("constant", "linear", "cosine")


def schedule(name: str, step: int, steps: int, warmup: float = 0) -> float:
    """What the learning rate is multiplied by in update `step` of 0 … steps-1: a number in (0, 1].

    With w warm-up steps the factor is (step+1)/(w+1) in the first w of them, so no update is wasted on a rate of zero. Then,
    with t = (step-w)/(steps-w) from 0 to below 1: "constant" 1, "linear" 1-t, "cosine" (1 + cos πt)/2 (Loshchilov & Hutter,
    arXiv:1608.03983). warmup: a number of steps, or a share of all steps if below 1.

    Raises ValueError for an unknown name, a step out of range, or a warm-up longer than the run.

    >>> [schedule("linear", step, 6, warmup=2) for step in range(6)]
    [0.3333333333333333, 0.6666666666666666, 1.0, 0.75, 0.5, 0.25]
    """
    if name not in SCHEDULES:
        raise ValueError(f"schedule {name!r}, expected one of {', '.join(SCHEDULES)}")
    if not 0 <= warmup <= steps:
        raise ValueError(f"warmup = {warmup} with steps = {steps}: expected 0 <= warmup <= steps, or a share below 1")
    if not 0 <= step < steps:
        raise ValueError(f"step {step} of {steps}: expected 0 <= step < steps")
    w = round(warmup * steps) if warmup < 1 else int(warmup)
    if step < w:
        return (step + 1) / (w + 1)
    t = (step - w) / (steps - w)
    return {"constant": 1.0, "linear": 1.0 - t, "cosine": 0.5 * (1.0 + math.cos(math.pi * t))}[name]
