"""Every loop is continued to the same numbers, and never saves one that is not finite."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dfkd_jax import build, contract, loops
from dfkd_jax.configs import common, common_prior, digits
from dfkd_jax.distributed import sharding
from dfkd_jax.errors import CollapseError, NonFiniteError
from dfkd_jax.loops import (
    Stopped,
    alternating,
    collapse,
    diffusion_prior,
    offline,
    session,
    supervised,
)
from dfkd_jax.reporting import metrics
from dfkd_jax.storage import model_folder
from dfkd_jax.storage.checkpoints import Checkpoints

pytestmark = pytest.mark.usefixtures('fast_runs')


def counting(total: int = 7, **changes: Any) -> session.Work:
    """Work whose state counts its units and adds up their numbers."""

    def advance(state: Any, done: int) -> tuple[Any, dict[str, Any]]:
        assert int(state[0]) == done
        return state + jnp.array([1.0, done]), {'s/unit': jnp.float32(done)}

    work = session.Work(
        plan=sharding.make('jit'),
        total=total,
        init=lambda: jnp.zeros(2),
        inputs=(),
        advance=advance,
        every=session.Every(log=2, measure=3, save=4),
        measure=lambda state: {'accuracy': 50 - abs(float(state[0]) - 3)},
        score='accuracy',
        advice='Lower it.',
    )
    return work._replace(**changes)


def rows(workdir: Path) -> dict[str, Any]:
    columns = metrics.read(workdir)
    return {name: list(column) for name, column in columns.items() if name != 'seconds'}


def test_cadences_and_the_best(tmp_path: Path) -> None:
    state, record = session.run(counting(), tmp_path, lambda: False)
    assert state.tolist() == [7, 21]
    found = rows(tmp_path)
    assert found['round'] == [2, 3, 4, 6, 7]
    assert found['s/unit'] == [0.5, 2, 3, 4.5, 6]  # means over the units since the last row
    np.testing.assert_array_equal(found['accuracy'], [np.nan, 50, np.nan, 47, 46])
    assert (record.last, record.best, record.best_at) == (46, 50, 3)
    assert sorted(path.name for path in (tmp_path / 'checkpoints').iterdir()) == ['4', '7']


@pytest.mark.parametrize('stop', range(1, 7))
def test_stopped_after_any_unit_and_continued(tmp_path: Path, stop: int) -> None:
    session.run(counting(), tmp_path / 'whole', lambda: False)
    asked = iter([False] * (stop - 1) + [True])
    with pytest.raises(Stopped):
        session.run(counting(), tmp_path / 'run', lambda: next(asked))
    state, record = session.run(counting(), tmp_path / 'run', lambda: False)
    assert state.tolist() == [7, 21] and record.best_at == 3
    assert str(rows(tmp_path / 'run')) == str(rows(tmp_path / 'whole'))


def watched(classes: list[float], **changes: Any) -> session.Work:
    """Work whose generator makes images of so many classes after each unit, measured at each."""
    return counting(
        total=len(classes), every=session.Every(1, 1, 1), patience=3, keep=9,
        signs=lambda state, row: {'classes': classes[int(state[0]) - 1]}, **changes,
    )  # fmt: skip


def test_a_generator_that_collapses_ends_the_run_where_it_was_last_well(tmp_path: Path) -> None:
    work = watched([2.0, 9.0, 8.0, 1.0, 1.2, 1.1, 1.0])
    match = 'collapsed by round 6: of its images, the classes among them .* from 9 to 1.1. Lower'
    with pytest.raises(CollapseError, match=match) as error:
        session.run(work, tmp_path, lambda: False)
    assert '\n' not in str(error.value) and 'collapse_patience=0' in str(error.value)
    saved = sorted(path.name for path in (tmp_path / 'checkpoints').iterdir())
    assert saved == ['1', '2', '3'], 'nothing is saved of a generator that is ill'
    with pytest.raises(CollapseError, match='by round 6'):  # the same numbers, from the third on
        session.run(work, tmp_path, lambda: False)


def test_a_generator_that_recovers_or_never_was_well_goes_on(tmp_path: Path) -> None:
    session.run(watched([9.0, 1.0, 1.0, 8.0, 1.0, 1.0, 9.0]), tmp_path / 'a', lambda: False)
    session.run(watched([1.0] * 7), tmp_path / 'b', lambda: False)
    asked = iter([False] * 2 + [True])
    with pytest.raises(Stopped):  # asked to, it saves all the same
        session.run(watched([9.0, 1.0, 1.0, 9.0]), tmp_path / 'c', lambda: next(asked))
    assert '3' in {path.name for path in (tmp_path / 'c' / 'checkpoints').iterdir()}


def test_signs_by_hand() -> None:
    assert collapse.effective_number(np.repeat([3, 5, 7, 8], 4)) == pytest.approx(4)
    assert collapse.effective_number(np.zeros(9, int)) == 1
    rng = np.random.default_rng(0)
    one = rng.normal(size=(1, 8, 8, 3))
    assert collapse.variation(np.repeat(one, 16, 0)) < 1e-12
    assert collapse.variation(rng.normal(size=(64, 8, 8, 3))) > 0.9
    assert collapse.variation(np.ones((4, 2, 2, 1))) == 0
    assert collapse.ill({'variation': 0.1}, {'variation': 0.9}) == ''
    assert 'variance' in collapse.ill({'variation': 0.001}, {'variation': 0.9})


@pytest.mark.parametrize('method', tiny.quick(['dafl', 'nayer'], 'nayer'))
@pytest.mark.slow
def test_a_generator_whose_weights_vanish_is_ill(method: str) -> None:
    """Of a real method: the generator makes one grey image, the bank is full of it."""
    _, whole, frozen, state = tiny.built(method)
    signs = collapse.watcher(sharding.make('jit'), whole, frozen, 0)

    def after(state: Any) -> dict[str, float]:
        for step in (whole.begin, whole.generator_step, whole.finish):
            state, row = step(frozen, state, jax.random.key(1))
        return signs(state, {'g/hit': 0.9})

    well = after(state)
    dead = jax.tree.map(jnp.zeros_like, state.generator.params)
    found = after(state.replace(generator=state.generator.replace(params=dead)))
    assert not collapse.ill(well, well)
    assert found['variation'] < 0.02 * well['variation'] and collapse.ill(found, well)


def test_a_metric_that_is_not_finite_is_named_with_its_unit(tmp_path: Path) -> None:
    def advance(state: Any, done: int) -> tuple[Any, dict[str, Any]]:
        return state, {'g/loss': 1.0, 'g/bn': np.float32(np.nan if done == 5 else 1)}

    work = counting(advance=advance)
    with pytest.raises(NonFiniteError, match='g/bn is nan at round 6. Lower it.'):
        session.run(work, tmp_path, lambda: False)
    with Checkpoints(tmp_path / 'checkpoints') as checkpoints:
        assert checkpoints.restore(jnp.zeros(2)).done == 4


def test_an_array_that_is_not_finite_is_named() -> None:
    good = contract.Net({'fc': {'kernel': np.ones(3)}}, {}, ())
    bad = good.replace(params={'fc': {'kernel': np.array([1.0, np.inf, 1.0])}})
    state = contract.State(round=np.int32(8), student=good, generator=())
    session.check_state(state, 8, counting())
    with pytest.raises(NonFiniteError, match='student/params/fc/kernel is not .* after round 8'):
        session.check_state(state.replace(student=bad), 8, counting())


# Every loop: its last update before a save spoils the weights, after all losses were finite.


def spoiling(step: Callable) -> Callable:
    """A compiled step whose returned state is not finite, and whose metrics are."""

    def call(*args: Any) -> Any:
        state, row = step(*args)
        return jax.tree.map(
            lambda x: x * jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else x, state
        ), row

    return call


def of_alternating(workdir: Path, patch: pytest.MonkeyPatch) -> Path:
    config = digits.get_config('noise,smoke')
    config.data.image_size = 4
    config.teacher.model = config.student.model = tiny.RESNET
    config.phases = (common.phase(rounds=1, g_steps=0, s_steps=1),)
    make_round = alternating.make_round
    patch.setattr(alternating, 'make_round', lambda *args: spoiling(make_round(*args)))
    loops.run(config, workdir)
    return workdir


def of_supervised(workdir: Path, patch: pytest.MonkeyPatch) -> Path:
    config = digits.get_config('noise,smoke')
    config.data.image_size = 4
    config.teacher.model = config.student.model = tiny.RESNET
    config.teach.batch_size = 1436  # an epoch is a step
    make_plan = build.make_plan

    def planned(mode: str) -> Any:
        plan = make_plan(mode)
        return plan._replace(compile_rows=lambda step: spoiling(plan.compile_rows(step)))

    patch.setattr(build, 'make_plan', planned)
    supervised.run(config, workdir)
    return workdir


def of_diffusion_prior(workdir: Path, patch: pytest.MonkeyPatch) -> Path:
    config = common_prior.prior(image_size=8, channels=1, widths=(8, 8), attention=())
    config = common_prior.finish(config, 'smoke')
    config.train.update(steps=1, warmup_steps=0)
    config.parallel, config.data.folder = 'jit', 'images'
    images = np.random.default_rng(0).integers(0, 255, (24, 8, 8, 1)).astype(np.uint8)
    patch.setattr(diffusion_prior, 'load_images', lambda _: (images[:16], images[16:]))
    make_plan = build.make_plan

    def planned(mode: str) -> Any:
        plan = make_plan(mode)
        return plan._replace(compile=lambda step: spoiling(plan.compile(step)))

    patch.setattr(build, 'make_plan', planned)
    diffusion_prior.run(config, workdir)
    return workdir


def of_offline(workdir: Path, patch: pytest.MonkeyPatch) -> Path:
    config = digits.get_config('diffdfkd,smoke')
    config.data.image_size = config.synthesis.stored_size = 4
    config.teacher.model = config.student.model = tiny.RESNET
    config.prior.path = str(tiny.saved_prior(workdir / 'prior'))
    config.loss.bn = 0.0
    module = build.make_classifier(tiny.RESNET, config.data)
    teacher = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 4, 4, 1)))
    make_round = offline.make_round
    patch.setattr(offline, 'make_round', lambda *args: spoiling(make_round(*args)))
    offline.synthesise(config, workdir / 'run', build.build(config), teacher, lambda: False)
    return workdir / 'run'


LOOPS = (of_alternating, of_supervised, of_diffusion_prior, of_offline)


@pytest.mark.parametrize('spoilt', tiny.quick(LOOPS, of_alternating, of_supervised))
def test_spoilt_weights_are_never_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoilt: Callable
) -> None:
    with pytest.raises(NonFiniteError, match='is not finite after (round|epoch|step|trajectory)'):
        spoilt(tmp_path, monkeypatch)
    saved = [path for path in tmp_path.rglob('checkpoints/*') if path.is_dir()]
    assert not [path for path in saved if 'teacher' not in path.parts]
    assert not list(tmp_path.rglob(f'student/{model_folder.VARIABLES}'))
    assert not list(tmp_path.rglob('batch-*'))
