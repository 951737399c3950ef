"""The study of all methods at equal time: how long its runs are, what it reads, what it tells."""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dfkd_jax.reporting import metrics

EXPERIMENTS = Path(__file__).resolve().parents[1] / 'experiments'


@pytest.fixture(scope='module')
def compare():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXPERIMENTS)
        import compare

        yield compare


def write_metrics(workdir: Path, columns: dict[str, list]) -> None:
    with metrics.Writer(workdir) as writer:
        for i, number in enumerate(columns['round']):
            writer.write(number, {k: v[i] for k, v in columns.items() if k != 'round'})


def loop_run(workdir: Path, accuracy: float, seconds: float = 1.0, **more: Any) -> Path:
    """What a run of the loop leaves, as far as the study reads it."""
    write_metrics(workdir, {
        'round': [1, 2, 3], 'seconds': [seconds, 2 * seconds, 3 * seconds],
        'teacher_queries': [10, 20, 30], 'student_accuracy': [accuracy - 2, None, accuracy],
    })  # fmt: skip
    (workdir / 'summary.json').write_text(json.dumps({
        'student_accuracy_last': accuracy, 'student_accuracy_best': accuracy + 1,
        'agreement_with_teacher': 50.0, 'seconds': 3 * seconds, 'images_synthesised': 5,
        'teacher_queries': 30, 'teacher_accuracy': 90.0, 'device': '1 x cpu',
        'versions': {'jax': '1'}, 'warnings': {}, **more,
    }))  # fmt: skip
    return workdir


def test_pairs(compare) -> None:
    found = compare.pairs('digits,fashion_mnist:lenet5/lenet5_half,cifar100:five')
    assert found[0] == ('digits', 'resnet8', 'resnet8_half')
    assert found[1].name == 'fashion_mnist:lenet5/lenet5_half'
    assert found[1].folder == 'fashion_mnist-lenet5-lenet5_half'
    assert [pair.student for pair in found[2:]] == [
        'resnet18', 'resnet18', 'wrn16_1', 'wrn40_1', 'wrn16_2',
    ]  # fmt: skip


def test_a_change_is_for_all_methods_or_for_those_it_names(compare) -> None:
    given = ['student.lr=0.05', 'dafl,dfq:generator.lr=0.1', "cpsc:data.data_dir='a:b=c'"]
    assert compare.changes(given, 'dfq') == ['student.lr=0.05', 'generator.lr=0.1']
    assert compare.changes(given, 'cpsc') == ['student.lr=0.05', "data.data_dir='a:b=c'"]
    assert compare.changes(given, 'kd') == ['student.lr=0.05']


def test_a_run_is_scaled_with_its_changes(compare, tmp_path: Path) -> None:
    args = argparse.Namespace(
        set=['diffdfkd:synthesis.batch_size=32', 'cpsc:phases[0].rounds=3'],
        smoke=False,
        flags='',
    )
    pair = compare.pairs('fashion_mnist')[0]
    whole = compare.Run(pair, 'cpsc', 0, tmp_path, args).config()
    assert compare.least_images(compare.Run(pair, 'diffdfkd', 0, tmp_path, args).config()) == 32
    assert whole == compare.load('fashion_mnist', 'cpsc')


def test_a_run_of_the_loop_is_timed_and_scaled(compare, tmp_path: Path) -> None:
    """Rounds of 2 s and 1 s, evaluations of 0.3 s, saves of 0.2 s, 7 s of compilation."""
    config = compare.load('digits', 'nayer')
    fields = compare.probe(config)
    assert fields['phases[1].rounds'] == compare.PROBE_ROUNDS
    each, took = (2.0, 1.0), []
    for phase in each:
        for i in range(compare.PROBE_ROUNDS):
            took.append(phase + {0: 3.4, 2: 0.6, 3: 0.2, 5: 0.3}.get(i, 0.0))
    rounds = list(range(1, len(took) + 1))
    write_metrics(tmp_path, {'round': rounds, 'seconds': list(np.cumsum(took))})
    (tmp_path / 'summary.json').write_text(json.dumps({'seconds': sum(took)}))
    receipt = compare.speeds(config, tmp_path)
    assert receipt['each'] == pytest.approx(each)
    assert receipt['evaluation'] == pytest.approx(0.5)
    assert receipt['start'] == pytest.approx(7.0)

    scaled = compare.lengths(config, receipt, seconds=7 + 20 * 0.5 + 3 * 70, points=20)
    assert scaled == compare.lengths(config, receipt, seconds=7 + 20 * 0.5 + 3 * 70, points=20)
    assert (scaled['phases[0].rounds'], scaled['phases[1].rounds']) == (9, 192)  # of 3 and 64
    assert scaled['eval_every_rounds'] == scaled['save_every_rounds'] == 11
    with pytest.raises(ValueError, match='too short'):
        compare.lengths(config, receipt, seconds=10, points=20)


def test_every_kind_of_run_has_a_length(compare) -> None:
    receipt = {'start': 1.0, 'evaluation': 0.0, 'each': [0.5]}

    def fields(method: str, seconds: float) -> dict:
        return compare.lengths(compare.load('digits', method), receipt, seconds, 10)

    assert fields('kd', 11) == {'teach.epochs': 20}
    assert fields('diffdfkd', 101) == {'synthesis.per_class': 200}
    assert fields('diffdfkd', 2) == {'synthesis.per_class': 64}  # a batch, at the least
    cpsc = fields('cpsc', 1 + 0.5 * 36)  # half of its 72 rounds, and of its warm-up
    assert (cpsc['phases[0].rounds'], cpsc['student.warmup_steps']) == (36, 25)
    assert fields('noise', 6)['phases[0].rounds'] == 10


def test_errors_of_the_user_are_told_and_others_end_the_study(compare, tmp_path: Path) -> None:
    def end(code: str) -> str:
        return compare.run(['python', '-c', code], tmp_path / 'result')

    assert end('import sys; sys.exit("error: no batch norms")') == 'no batch norms'
    with pytest.raises(SystemExit, match='stopped'):
        end('raise RuntimeError')
    with pytest.raises(SystemExit, match='stopped'):
        end('pass')  # asked to stop: it saved, and left no result
    (tmp_path / 'result').touch()
    assert end('pass') == ''


def arguments(tmp_path: Path) -> argparse.Namespace:
    return argparse.Namespace(
        runs=tmp_path / 'runs', seconds=60.0, points=4, finished=False, smoke=True, set=[],
        flags='', data_dir=None, output=tmp_path / 'out', teacher=[],
    )  # fmt: skip


def test_a_method_runs_without_the_term_that_a_teacher_cannot_have(
    compare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], result: Path) -> str:
        commands.append(command)
        if '--config.loss.bn=0' not in command:
            loop_run(result.parent, 10.0, warnings={'no_batch_statistics': 'a prior instead'})
            return ''
        loop_run(result.parent, 70.0 if result.parent.name == 'seed0' else 60.0)
        return ''

    monkeypatch.setattr(compare, 'run', run)
    monkeypatch.setattr(
        compare, 'speeds', lambda *_: {'start': 1.0, 'evaluation': 0.0, 'each': [1.0, 1.0]}
    )
    pair = compare.Pair('fashion_mnist', 'lenet5', 'lenet5_half')
    runs = [compare.Run(pair, 'nayer', s, Path('T'), arguments(tmp_path)) for s in (0, 1)]
    rows = [run.row() for run in runs]
    assert len(commands) == 2 + 2  # two probes, one measured; two runs
    assert all('--config.teacher.model=lenet5' in command for command in commands)
    assert [row['last'] for row in rows] == [70.0, 60.0]
    assert [run.row() for run in runs] == rows and len(commands) == 4  # nothing runs again
    assert rows[0]['note'] == 'without batch statistics'
    table = compare.report([{'teacher_sha256': 'abc', **row} for row in rows])
    assert '| nayer | 65.00 ± 7.07 | 66.00 ± 7.07 | 50.00 ± 0.00 | 3 | 5 | 30 | 2 |' in table[-1]
    assert 'without batch statistics' in table[-1]


def test_a_method_that_cannot_run_is_told(
    compare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, 'run', lambda *_: 'no maps of equal size')
    args = arguments(tmp_path)
    run = compare.Run(compare.Pair('digits', 'a', 'b'), 'zskt', 0, Path('T'), args)
    row = dict.fromkeys(compare.COLUMNS) | run.row() | {'teacher_sha256': 'abc'}
    assert row['last'] is None
    assert 'no maps of equal size' in compare.report([row])[-1]
    args.finished = True
    assert run.row()['note'] == 'no maps of equal size'
    assert compare.Run(run.pair, 'dafl', 0, Path('T'), args).row() is None


def test_curves(compare, tmp_path: Path) -> None:
    runs = [loop_run(tmp_path / str(i), 80.0 + i, 1.0 + i) for i in range(2)]
    assert compare.history(runs[0]).tolist() == [[1, 3], [10, 30], [78, 80]]
    kd = tmp_path / 'kd'
    write_metrics(kd / 'distillation', {
        'round': [1, 2], 'seconds': [5.0, 9.0], 'test_accuracy': [80.0, 90.0],
    })  # fmt: skip
    facts = {'teacher_queries': 100, 'images_distilled': 80, 'seconds_synthesis': 3.0}
    (kd / 'summary.json').write_text(json.dumps(facts))
    assert compare.history(kd).tolist() == [[8, 12], [60, 100], [80, 90]]
    compare.draw({'noise': runs, 'diffdfkd': [kd]}, 'digits', tmp_path / 'curves.png')
    assert (tmp_path / 'curves.png').stat().st_size > 10_000


def test_published_numbers_stand_beside_ours(compare) -> None:
    import published

    with open(EXPERIMENTS / 'published.csv', newline='') as file:
        theirs = list(csv.DictReader(file))
    assert all(0 < float(row['accuracy']) <= 100 for row in theirs if row['accuracy'])
    assert all(row['source'] and row['tag'] != 'unknown' for row in theirs if row['accuracy'])
    [row] = [r for r in theirs if r['name'] == 'Fast-DFKD, 10 steps'
             and r['pair'] == 'cifar10:wrn40_2/wrn16_1']  # fmt: skip
    assert (row['accuracy'], row['hours']) == ('89.29', '0.15')
    assert (EXPERIMENTS / 'published.md').read_text() == published.render(theirs, [])
    ours = {'pair': 'cifar10:wrn40_2/wrn16_1', 'method': 'dafl', 'best': '50', 'seconds': '10'}
    text = published.render(theirs, [ours, ours | {'best': '60'}])
    assert '| DAFL | 65.71 | 1.73 | 55.00 ± 7.07 | 10 | README of Fast-Datafree |' in text
