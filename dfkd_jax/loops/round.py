"""A round of a method, compiled as the plan says."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax

from dfkd_jax.contract import Method, State, unchanged
from dfkd_jax.distributed import sharding


def make_round(method: Method, phase: Any, plan: sharding.Plan, warmup: bool = False) -> Callable:
    """A round, ``(frozen, state, key) -> (state, metrics)``.

    It is `phase.loops` batches of synthesis, then `phase.s_steps` student steps.  If the plan
    fuses, it is one compiled program; else compiled steps are called one by one, with the same
    keys.

    warmup: whether the phase comes before the student's first step.
    """

    begin, generator_step, finish, student_step = _steps(method, plan, warmup)

    def repeat(step: Callable, frozen: Any, state: State, key: Any, times: int) -> Any:
        times = 0 if step is unchanged else times
        return sharding.repeat(step, frozen, state, key, times, plan.fused)

    def synthesis(frozen: Any, state: State, inputs: Any) -> Any:
        key_begin, key_step, key_finish = jax.random.split(jax.random.fold_in(*inputs), 3)
        state, first = repeat(begin, frozen, state, key_begin, 1)
        state, steps = repeat(generator_step, frozen, state, key_step, phase.g_steps)
        state, last = repeat(finish, frozen, state, key_finish, 1)
        return state, first | steps | last

    def round_fn(frozen: Any, state: State, key: Any) -> Any:
        key_synthesis, key_student = jax.random.split(key)
        state, made = repeat(synthesis, frozen, state, key_synthesis, phase.loops)
        state, learnt = repeat(student_step, frozen, state, key_student, phase.s_steps)
        return state.replace(round=state.round + 1), made | learnt

    return plan.compile(round_fn) if plan.fused else round_fn


@lru_cache(maxsize=2)  # the phases of a run share their compiled steps
def _steps(method: Method, plan: sharding.Plan, warmup: bool) -> tuple[Callable, ...]:
    """The steps of a round in order, numbered; compiled unless the whole round is."""

    def prepare(step: Callable) -> Callable:
        numbered = sharding.numbered(step)
        return numbered if plan.fused else plan.compile(numbered)

    generator_step = (warmup and method.warmup_step) or method.generator_step
    steps = (method.begin, generator_step, method.finish, method.student_step)
    return tuple(unchanged if step is unchanged else prepare(step) for step in steps)
