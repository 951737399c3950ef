"""Every way a run can be hurt: it loses nothing that was saved, says what happened, and continues
to the same bits.

    python -m pytest -m faults                    all of it
    python -m pytest tests/test_faults.py -m slow -k "one_moment or grow"     the short form
    python -m pytest -m faults tests/test_faults.py --fault_table=experiments/faults.md

Runs are tiny (4 pixels), and processes of their own; `launcher.py` lets the tests hold one at the
door of a phase.  Moments are drawn from seeded generators, delays within what a phase takes.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny
from processes import BATCHES, ROUNDS, SMALL, Forked, launcher, process

from dfkd_jax.reporting import metrics
from dfkd_jax.storage import checkpoints, files

pytestmark = pytest.mark.faults
MANY = pytest.param(30, marks=pytest.mark.slow)
MAIN, TEACH = 'dfkd_jax.main', 'dfkd_jax.teach'

LOOP = [
    '--config=configs/digits.py:METHOD,smoke', *SMALL, *ROUNDS, '--config.parallel=jit',
    '--config.generator.latent=8', '--config.phases[0].rounds=24', '--config.eval_every_rounds=3',
    '--config.save_every_rounds=4',
]  # fmt: skip
OFFLINE = [
    '--config=configs/digits.py:diffdfkd,smoke', *SMALL, *BATCHES, '--config.parallel=jit',
    '--config.loss.adversarial=1.0', '--config.synthesis.per_class=6', '--config.in_loop.every=4',
    '--config.in_loop.start=4', '--config.in_loop.steps=3', '--config.in_loop.batch_size=8',
    '--config.distil.epochs=4', '--config.distil.save_every_epochs=1',
]  # fmt: skip


class Job(NamedTuple):
    """A command, and what it leaves when nobody hurts it."""

    module: str
    arguments: list[str]
    whole: Path
    seconds: dict[str, float]  # what a phase usually takes
    entries: Counter[str]  # how often it is entered


@pytest.fixture(scope='module')
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Forked]]:
    with launcher(tmp_path_factory.mktemp('launcher')) as start:
        yield start


@pytest.fixture(scope='module')
def jobs(start: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Job]:
    """The undisturbed jobs by name: 'teacher', 'diffdfkd', or a method of the loop."""
    home, made = tmp_path_factory.mktemp('whole'), {}

    def job(name: str) -> Job:
        if name in made:
            return made[name]
        module, arguments, whole = MAIN, LOOP, home / name
        if name == 'teacher':
            module, arguments = TEACH, [LOOP[0].replace('METHOD', 'cpsc'), *SMALL]
            fields = ('parallel=jit', 'teach.epochs=6', 'teach.lr=0.05')
            arguments += [f'--config.{field}' for field in fields]
        elif name == 'diffdfkd':
            arguments = [*OFFLINE, f'--config.prior.path={tiny.saved_prior(home / "prior")}']
        if name != 'teacher':
            arguments = [each.replace('METHOD', name) for each in arguments]
            arguments.append(f'--config.teacher.checkpoint={job("teacher").whole}')
        if name == 'cmi':
            small = ('head.width=8', 'synthesis.bank=16', 'synthesis.memory=16')
            arguments += [f'--config.{field}' for field in (*small, 'synthesis.negatives=8')]
        run = begin(start, Job(module, arguments, whole, {}, Counter()), whole, marks=True)
        spent: dict[str, list[float]] = {}
        while (phase := run.next()) is not None:
            entered = time.monotonic()
            run.go()
            spent.setdefault(phase, []).append(entered)
        assert run.status == 0, run.said()
        entered = sorted((at, phase) for phase, times in spent.items() for at in times)
        lengths: dict[str, list[float]] = {phase: [0.01] for phase in spent}
        for (at, phase), (then, _) in zip(entered, entered[1:], strict=False):
            lengths[phase].append(then - at)
        usual = {phase: statistics.median(times) for phase, times in lengths.items()}
        counts = Counter({phase: len(times) for phase, times in spent.items()})
        made[name] = Job(module, arguments, whole, usual, counts)
        return made[name]

    return job


def begin(start: Any, job: Job, workdir: Path, **options: Any) -> Forked:
    log = workdir.with_suffix('.log')
    return start(job.module, [*job.arguments, f'--workdir={workdir}'], log, **options)


def to_the_end(start: Any, job: Job, workdir: Path, **options: Any) -> str:
    """Continues until it is done; returns what it said."""
    run = begin(start, job, workdir, **options)
    assert run.wait() == 0, run.said()
    assert 'Traceback' not in run.said()
    return run.said()


def refused(run: Forked, message: str) -> str:
    """The one line that a run ended with, which is an error of this pattern."""
    assert run.wait() not in (0, None), run.said()
    said = run.said()
    assert 'Traceback' not in said, said
    line = said[said.index('error: ') :].strip()
    assert re.search(message, line, re.DOTALL), said
    return line


def same(job: Job, workdir: Path) -> None:
    """It left what the undisturbed run did, to the bit, but for seconds."""

    def files(folder: Path) -> dict[str, bytes]:
        kinds = ('*.safetensors', 'metrics.csv', 'summary.json', 'model.json')
        paths = [path for kind in kinds for path in folder.rglob(kind)]
        paths = [path for path in paths if 'broken' not in str(path)]
        return {path.relative_to(folder).as_posix(): content(path) for path in paths}

    def content(path: Path) -> Any:
        if path.name == metrics.FILE:
            columns = metrics.read(path.parent)
            return {name: x.tobytes() for name, x in columns.items() if name != 'seconds'}
        if path.suffix == '.json':
            facts = json.loads(path.read_text())
            names = ('seconds', 'seconds_synthesis', 'seconds_distillation', 'bank')
            return {name: value for name, value in facts.items() if name not in names}
        return path.read_bytes()

    here, there = files(workdir), files(job.whole)
    assert here.keys() == there.keys()
    assert [name for name in here if here[name] != there[name]] == []


def saved(workdir: Path) -> dict[str, int]:
    """The last whole checkpoint of each training in a workdir, and the images of a bank."""
    last: dict[str, int] = {}
    for path in workdir.rglob('checkpoints/*'):
        if path.name.isdecimal() and path.is_dir():
            training = path.parent.parent.relative_to(workdir).as_posix()
            last[training] = max(last.get(training, 0), int(path.name))
    if (workdir / 'bank').is_dir():
        last['bank'] = len(list((workdir / 'bank').glob('batch-*')))
    return last


# 1. Killed, and told to stop

PHASES = [
    ('cpsc', 'compile'), ('cpsc', 'synthesis'), ('cpsc', 'distillation'), ('cpsc', 'evaluation'),
    ('cpsc', 'checkpoint write'), ('cpsc', 'results'), ('teacher', 'training'),
    ('teacher', 'checkpoint write'), ('diffdfkd', 'synthesis'), ('diffdfkd', 'bank write'),
]  # fmt: skip
HOW = (signal.SIGKILL, signal.SIGTERM)
Moment = tuple[str, signal.Signals]


def survive(start: Any, job: Job, moments: list[Moment], seed: str, folder: Path) -> Counter[str]:
    """Hurts runs at these moments, continues each, and compares what they leave at their end.

    Returns how they ended: killed, stopped and saved, or at their end before they were told.
    """
    rng, ends, number, kept = random.Random(seed), Counter[str](), 0, dict[str, int]()
    for phase, how in moments:
        # Compiled anew where that is the point, else taken from the cache.
        options = {'jax_enable_compilation_cache': False} if phase == 'compile' else {}
        while True:
            workdir = folder / f'run{number}'
            run = begin(start, job, workdir, marks=True, options=options)
            # Not far into what is left, so that a run has room for several moments.
            if run.reach(phase, rng.randint(1, max(1, min(job.entries[phase] // 3, 40)))):
                break
            assert run.status == 0, run.said()
            same(job, workdir)
            number, kept = number + 1, {}
        status = run.strike(rng.uniform(0, job.seconds[phase]), how)
        said, before, kept = run.said(), kept, saved(workdir)
        assert 'Traceback' not in said and 'error: ' not in said, said
        # Nothing that was saved is lost, and nothing of it is done again.
        assert all(kept.get(name, 0) >= last for name, last in before.items()), (before, kept)
        for after in re.findall(r'continuing after \w+ (\d+)', said):
            assert int(after) in {*before.values(), *kept.values()}, (after, before, said)
        if status == -signal.SIGKILL and how == signal.SIGKILL:
            ends['killed'] += 1
            continue
        assert status == 0, said
        stopped = re.findall(r'stopped (?:and saved )?after \w+ (\d+)', said)
        assert all(int(after) in kept.values() for after in stopped), (kept, said)
        ends['stopped and saved' if stopped else 'ended before it was told'] += 1
    to_the_end(start, job, folder / f'run{number}')
    same(job, folder / f'run{number}')
    return ends


@pytest.mark.slow
@pytest.mark.parametrize('how', HOW, ids=['kill', 'term'])
@pytest.mark.parametrize('name, phase', PHASES, ids=['-'.join(each) for each in PHASES])
def test_thirty_moments_of_a_phase(start, jobs, tmp_path, fault_table, name, phase, how) -> None:
    ends = survive(start, jobs(name), [(phase, how)] * 30, f'{name} {phase} {how}', tmp_path)
    told = ', '.join(f'{count} {end}' for end, count in sorted(ends.items()))
    fault_table(f'{how.name} in {phase} ({name})', 'at a random moment of it', 30, told, SAME)


@pytest.mark.parametrize('name', ['diffdfkd', 'cpsc'])
@pytest.mark.slow
def test_one_moment_of_each_phase(start, jobs, tmp_path, name) -> None:
    """But for what takes long: compiling, and leaving results."""
    long = ('compile', 'results')
    phases = [phase for of, phase in PHASES if of == name and phase not in long]
    if name == 'cpsc':  # in every run of the tests: one of each half, and the writing of a file
        phases = ['synthesis', 'distillation', 'checkpoint write']
    moments = [(phase, HOW[i % 2]) for i, phase in enumerate(phases)]
    ends = survive(start, jobs(name), moments, name, tmp_path)
    assert ends['killed'] == (len(phases) + 1) // 2


# 2. The disk


@contextlib.contextmanager
def full(folder: Path) -> Iterator[None]:
    """A folder on a disk of its own, which the block finds full: to a write, not to a look."""
    filler = folder / 'filler'
    with open(filler, 'wb', buffering=0) as file, contextlib.suppress(OSError):
        for size in (2**20, 2**12):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))
    yield
    filler.unlink()


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """A folder that cannot be written in the block."""
    commands = (['mount', '--bind', folder, folder], ['mount', '-o', 'remount,bind,ro', folder])
    for command in commands:
        subprocess.run(command, check=True)
    yield
    subprocess.run(['umount', '--lazy', folder], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk, where the system lets us have one."""
    place = tmp_path / 'disk'
    place.mkdir()
    command = ['mount', '-t', 'tmpfs', '-o', 'size=64m', 'faults', place]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip('mounting a disk needs the rights of root')
    yield place
    subprocess.run(['umount', '--lazy', place], check=True)


DISK = [
    (
        'cpsc',
        'checkpoint write',
        2,
        '.',
        'the checkpoint of round 8 cannot be written to',
    ),
    ('cpsc', 'evaluation', 4, '.', 'No space left|Read-only'),
    ('cpsc', 'results', 1, '.', 'No space left|Read-only'),
    ('diffdfkd', 'bank write', 5, 'bank', 'No space left|Read-only'),
    ('teacher', 'checkpoint write', 3, '.', 'the checkpoint of round 3 cannot be written to'),
]


@pytest.mark.slow
@pytest.mark.parametrize('fault', [full, read_only])
@pytest.mark.parametrize('name, phase, entry, where, message', DISK)
def test_disk(start, jobs, disk, fault_table, fault, name, phase, entry, where, message) -> None:
    job, workdir = jobs(name), disk / 'run'
    run = begin(start, job, workdir, marks=True)
    assert run.reach(phase, entry), run.said()
    kept = saved(workdir)
    place = workdir / 'checkpoints' if phase == 'checkpoint write' else workdir / where
    with fault(disk if fault is full else place):
        run.go()
        said = refused(run, message)
        assert saved(workdir) == kept
    to_the_end(start, job, workdir)
    same(job, workdir)
    told = 'a full disk' if fault is full else 'a read-only folder'
    fault_table(f'{told} in {phase} ({name})', 'tmpfs' if fault is full else 'remounted', 1,
                short(said, disk), SAME)  # fmt: skip


@pytest.mark.slow
def test_a_file_that_may_not_grow(start, jobs, tmp_path, fault_table) -> None:
    """What a disk full in the midst of a file is like, without the rights of root."""
    job, workdir = jobs('cpsc'), tmp_path / 'run'
    run = begin(start, job, workdir, marks=True, file_size=2)
    said = refused(run, 'the checkpoint of round 8 cannot be written to .* that of round 4')
    assert saved(workdir) == {'.': 4}
    assert 'continuing after round 4 of' in to_the_end(start, job, workdir)
    same(job, workdir)
    fault_table('a checkpoint cut short by the system (cpsc)', 'RLIMIT_FSIZE', 1,
                short(said, tmp_path), SAME)  # fmt: skip


# 3. Damaged checkpoints


@pytest.fixture(scope='module')
def stopped(start, jobs, tmp_path_factory) -> Path:
    """A run with the checkpoints of rounds 8 and 12, killed."""
    workdir = tmp_path_factory.mktemp('stopped') / 'run'
    run = begin(start, jobs('cpsc'), workdir, marks=True)
    assert run.reach('checkpoint write', 4)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    assert saved(workdir) == {'.': 12}
    return workdir


def damage(path: Path, how: str, at: int | None = None) -> None:
    """at: the byte that has its bit flipped; None: that in the middle."""
    data = bytearray(path.read_bytes())
    if how == 'missing':
        path.unlink()
    elif how == 'truncated':
        path.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2 if at is None else at] ^= 4
        path.write_bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize('how', ['truncated', 'with a flipped bit', 'missing'])
def test_damaged_checkpoint(start, jobs, stopped, tmp_path, fault_table, how) -> None:
    """Each file of the newest in turn: the run goes on from the one before."""
    job, newest = jobs('cpsc'), stopped / 'checkpoints' / '12'
    files = [path.relative_to(stopped) for path in sorted(newest.rglob('*')) if path.is_file()]
    files = [path for path in files if (stopped / path).stat().st_size]
    for number, path in enumerate(files):
        workdir = Path(shutil.copytree(stopped, tmp_path / str(number)))
        damage(workdir / path, how)
        said = to_the_end(start, job, workdir)
        last = 12 if path.name == checkpoints.FILES and how == 'missing' else 8
        assert f'continuing after round {last} of' in said, (path, said)
        assert ('checkpoint of round 12 cannot be read' in said) == (last == 8)
        same(job, workdir)
        shutil.rmtree(workdir)
    said = 'the checkpoint of round 12 cannot be read (...); it is set aside as 12.broken, ...'
    fault_table(f'a file of the newest checkpoint {how} (cpsc)', 'each file in turn', len(files),
                said, f'continues after round 8: {SAME}')  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize('how', ['truncated', 'with a flipped bit', 'missing'])
def test_damaged_bank(start, jobs, tmp_path, fault_table, how) -> None:
    """One batch of images: what the message says to do gives the images and student back."""
    job, workdir = jobs('diffdfkd'), tmp_path / 'run'
    run = begin(start, job, workdir, marks=True)
    assert run.reach('bank write', 25)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    assert saved(workdir)['bank'] == 24
    files = sorted((workdir / 'bank').glob('batch-*'))
    damage(files[3], how, -1)  # images are the last in a file
    said = 'synthesises it and all after it again'
    if how != 'missing':
        told = {'truncated': 'is missing or damaged', 'with a flipped bit': 'not what was written'}
        line = refused(begin(start, job, workdir), f'{files[3].name}.*{told[how]}.*Remove it and')
        for path in sorted((workdir / 'bank').glob('batch-*'))[3:]:
            path.unlink()
        said = f'{short(line, tmp_path)} That done:'
    to_the_end(start, job, workdir)
    same(job, workdir)
    fault_table(f'a batch of the bank {how} (diffdfkd)', 'the fourth of 24', 1, said, SAME)


OTHERS = {
    'every checkpoint truncated': ('no checkpoint in .* can be read; they are kept there as', None),
    'config.json truncated': ('config.json is not JSON .*Put a copy back', None),
    'a newer layout': ('has all the bytes that were saved.*format is 3, here 2.*another version',
                       dict(format=3)),
    'a layout without a list of arrays': ('has all the bytes .*another version',
                                          dict(layout=None)),
    'an older layout, of other arrays': ('arrays are not those of this run:.*old: float32',
                                         dict(layout={'a/params/old': 'float32[3]'})),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize('name', OTHERS)
def test_checkpoints_that_cannot_be_used(start, jobs, stopped, tmp_path, fault_table, name) -> None:
    job, workdir = jobs('cpsc'), Path(shutil.copytree(stopped, tmp_path / 'run'))
    message, change = OTHERS[name]
    if change is None:
        for path in workdir.rglob('manifest.ocdbt' if 'every' in name else 'config.json'):
            damage(path, 'truncated')
    else:
        newest = workdir / 'checkpoints' / '12'
        record = newest / 'record' / 'metadata'
        changed = json.loads(record.read_text()) | change
        record.write_text(json.dumps({k: v for k, v in changed.items() if v is not None}))
        files.write_json(newest / checkpoints.FILES, checkpoints._file_sums(newest))
    said = refused(begin(start, job, workdir), message)
    if change is not None:
        assert saved(workdir) == {'.': 12}  # nothing was touched
    shutil.rmtree(workdir)
    shutil.copytree(stopped, workdir)
    to_the_end(start, job, workdir)
    same(job, workdir)
    fault_table(f'{name} (cpsc)', 'changed on disk', 1, short(said, tmp_path),
                f'with what was there put back: {SAME}')  # fmt: skip


# 4. Numbers, clocks, neighbours, data

POISON = [
    ('cpsc', 'generator/params', 'a generator'), ('cpsc', 'student/params', 'a student'),
    ('cmi', 'extra/memory', 'a bank of features'), ('cmi', 'extra/making', 'images for a bank'),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize('name, part, what', POISON)
def test_nan(start, jobs, tmp_path, fault_table, name, part, what) -> None:
    job, workdir = jobs(name), tmp_path / 'run'
    run = begin(start, job, workdir, poison=[part, 9])
    said = refused(run, r'(is nan at round 10|is not finite after round 1\d)\. The last good check')
    assert saved(workdir) == {'.': 8}
    assert 'continuing after round 8 of' in to_the_end(start, job, workdir)
    same(job, workdir)
    fault_table(f'NaN in {what} ({name})', f'{part} at round 9', 1, short(said, tmp_path), SAME)


@pytest.mark.slow
@pytest.mark.parametrize('years', [-10, 10])
def test_clock(start, jobs, tmp_path, fault_table, years) -> None:
    """It jumps at every look, and the files of the first part are of another decade."""
    job, workdir, clock = jobs('cpsc'), tmp_path / 'run', years * 365.25 * 86400
    run = begin(start, job, workdir, marks=True, clock=clock)
    assert run.reach('synthesis', job.entries['synthesis'] // 2)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    for path in workdir.rglob('*'):
        os.utime(path, (time.time() + clock,) * 2)
    assert 'continuing after round' in to_the_end(start, job, workdir, clock=-clock)
    same(job, workdir)
    assert 0 < json.loads((workdir / 'summary.json').read_text())['seconds'] < 1000
    fault_table(f'a clock that jumps by {years} years and back (cpsc)',
                'at every look, and one kill', 1, 'nothing', SAME)  # fmt: skip


@pytest.mark.slow
def test_two_runs_of_one_folder(start, jobs, tmp_path, fault_table) -> None:
    job, workdir = jobs('cpsc'), tmp_path / 'run'
    run = begin(start, job, workdir, marks=True)
    assert run.reach('synthesis', 5)
    with process(job.arguments, workdir) as second:
        assert second.wait() == 1
    found = re.search('error: another process is running in .*: wait for its end.*', run.said())
    assert found, run.said()
    run.go()
    assert run.wait() == 0
    same(job, workdir)
    fault_table('a second run in one workdir (cpsc)', 'while the first synthesises', 1,
                short(found[0], tmp_path), f'the first is not disturbed: {SAME}')  # fmt: skip


@pytest.mark.slow
def test_data_that_vanishes(start, jobs, tmp_path, fault_table) -> None:
    """Under a teacher's training that reads its images as it goes."""
    import standins

    standins.cifar(tmp_path / 'data', 'cifar10')
    arguments = [
        '--config=configs/cifar10.py:cpsc,smoke', f'--config.data.data_dir={tmp_path / "data"}',
        '--config.data.image_size=8', '--config.parallel=jit', '--config.teach.batch_size=5',
        '--config.teach.epochs=6', '--config.teacher.model=resnet8_half',
    ]  # fmt: skip
    job = Job(TEACH, arguments, tmp_path / 'whole', {}, Counter())
    to_the_end(start, job, job.whole, lazy=True)
    workdir, place = tmp_path / 'run', next((tmp_path / 'data').rglob('*train*'))
    run = begin(start, job, workdir, marks=True, lazy=True)
    assert run.reach('training', 20), run.said()
    content = place.read_bytes()
    place.write_bytes(b'')
    run.go()
    # What is left of it in memory may be read for a while, and is no image any more.
    said = refused(
        run,
        'cifar10: images of train in .* can no longer be read.*Put the folder back'
        r'|cifar10: image \d+ of train in .* cannot be used .*Put back a whole copy of the folder',
    )
    place.unlink()
    refused(begin(start, job, workdir, lazy=True), 'is not whole, .* is missing')
    place.write_bytes(content)
    assert 'continuing after epoch' in to_the_end(start, job, workdir, lazy=True)
    same(job, workdir)
    fault_table('a data set that vanishes (teacher)', 'its file emptied, then removed', 1,
                short(said, tmp_path), f'once it is back: {SAME}')  # fmt: skip


# The table

SAME = 'the bits of the undisturbed run'


def short(said: str, folder: Path) -> str:
    """One line, in which the test's folder is DIR."""
    return ' '.join(said.replace(str(folder), 'DIR').split())


@pytest.fixture(scope='session')
def fault_table(request: pytest.FixtureRequest) -> Callable[..., None]:
    """``add(fault, how, times, said, resume)``: a row of the table, if one is asked for.

    A row of that fault which is there already is replaced, so the table may be made in parts.
    """
    path = request.config.getoption('--fault_table')
    return lambda *cells: add_row(Path(path), *cells) if path else None


def add_row(path: Path, *cells: str | int) -> None:
    rows = {}
    if path.exists():
        lines = path.read_text().splitlines()
        rows = {line.split(' | ')[0]: line for line in lines if line.startswith('| ')}
    row = '| ' + ' | '.join(str(cell).replace('|', '/') for cell in cells) + ' |'
    rows |= {row.split(' | ')[0]: row}
    rows.pop('| fault', None)
    files.write_bytes(path, '\n'.join([TITLE, *sorted(rows.values()), '']).encode())


TITLE = """# Faults

What hurt runs say, and what the same command gives afterwards. A row is written by the test that
passed (tiny runs at 4 pixels, one CPU core):

```sh
python -m pytest -m faults tests/test_faults.py --fault_table=experiments/faults.md
```

Nothing is lost beyond the last save: what a run continued to was compared with an undisturbed one,
weights, metrics and summary, bit for bit but for seconds.

| fault | how | times | what the run said | what the resume gave |
|---|---|---|---|---|"""
