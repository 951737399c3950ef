"""A long run compiles in the first round of a phase, and never again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from dfkd_jax import loops
from dfkd_jax.configs import common, digits
from dfkd_jax.loops import alternating

pytestmark = pytest.mark.usefixtures('fast_runs')
EVENT = '/jax/core/compile/backend_compile_duration'  # of a program, compiled or from the cache


@pytest.fixture
def compiled() -> Iterator[list[str]]:
    """The programs that were made, as they are made."""
    programs: list[str] = []

    def listen(event: str, seconds: float, **facts: Any) -> None:
        del seconds
        if event == EVENT:
            programs.append(str(facts.get('fun_name', event)))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield programs
    jax.monitoring.clear_event_listeners()


@pytest.mark.slow
@pytest.mark.parametrize('method', ['cpsc', 'cae'])
def test_no_program_is_made_after_the_first_round_of_a_phase(
    compiled: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    config = digits.get_config(f'{method},smoke')
    config.data.image_size, config.teacher.model = 4, 'resnet8_half'
    config.teach.update(epochs=1, batch_size=128)
    config.generator.width, config.parallel = 4, 'jit'
    config.synthesis.update(batch_size=40, student_batch_size=8, bank=160)
    rounds = (3, 4)
    config.phases = (
        common.phase(rounds=rounds[0], g_steps=2, s_steps=0, loops=2),
        common.phase(rounds=rounds[1], g_steps=1, s_steps=2),
    )
    # All that a round may bring: a row, an evaluation, a checkpoint.
    config.log_every_rounds = config.eval_every_rounds = config.save_every_rounds = 1
    make_round, before = alternating.make_round, []

    def make_counting(*args: Any) -> Callable:
        round_fn = make_round(*args)

        def counting(*inputs: Any) -> Any:
            before.append(len(compiled))
            return round_fn(*inputs)

        return counting

    monkeypatch.setattr(alternating, 'make_round', make_counting)
    loops.run(config, tmp_path / 'run')
    assert len(before) == sum(rounds)
    assert before[0] > 0  # they are counted
    first, second = before[1 : rounds[0] + 1], before[rounds[0] + 1 :]
    assert compiled[first[0] : first[-1]] == []
    assert compiled[second[0] : second[-1]] == []
