"""The loop of a method that samples from a diffusion model: all synthesis first, then distillation.

    workdir/bank/          synthetic images (`disk_bank`), a file for each trajectory
    workdir/synthesis/     what was measured of them
    workdir/in_loop/       students trained on the images so far, if the method asks for one
    workdir/distillation/  the student (`teach.fit`): a model folder with its checkpoints

Killed at any moment it continues to the same images and the same student: image files are whole or
absent, a trajectory depends on the run's seed, its number and the student of its time alone, and
trainings have checkpoints of their own.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dfkd_jax import build, data, evaluate, labels
from dfkd_jax.contract import Batch, Frozen
from dfkd_jax.data import synthetic
from dfkd_jax.distributed import processes
from dfkd_jax.loops import supervised
from dfkd_jax.loops.round import make_round
from dfkd_jax.methods import diffdfkd
from dfkd_jax.reporting import artifacts, metrics, page
from dfkd_jax.reporting.progress import Progress
from dfkd_jax.storage import files, model_folder

SHOWN = 10  # images of a class in the picture that a run leaves
UNSTABLE = (
    'The images so far are in {bank}. Lower config.loss, or set config.prior.dtype=float32, in a '
    'new --workdir.'
)


def distil(
    config: Any,
    workdir: Path,
    run: build.Run,
    test: data.Dataset,
    teacher: dict[str, Any],
    interrupted: Callable[[], bool],
) -> dict[str, Any]:
    """Synthesises into ``workdir/bank``, distils from it and leaves what every run leaves.

    Returns the summary; ``{}`` for a run that was asked to stop.  Raises BankError for a damaged
    bank or another's that is not full or not of this config, ConfigError and NonFiniteError.
    """
    on_devices = run.plan.replicate(teacher)
    by_teacher, _, teacher_accuracy = evaluate.teacher(
        config, run.plan, run.models.teacher, on_devices, test
    )
    total, bank = diffdfkd.trajectories(config), Path(config.synthesis.bank or workdir / 'bank')
    # Now, since a mistake in it would be told hours later.
    size = config.data.num_classes * config.synthesis.per_class
    name, at = config.student.model, workdir / 'distillation'
    epoch_steps = size // config.distil.batch_size
    training = supervised.prepare(config, 'distil', name, epoch_steps, distil=True)
    if config.synthesis.bank:
        synthetic.check(bank, description(config))
        synthesis_seconds = 0.0
    else:
        seconds = synthesise(config, workdir, run, teacher, interrupted)
        if seconds is None:
            return {}
        synthesis_seconds = seconds

    images = synthetic.dataset(bank, total, run.facts, config.synthesis.stored_size)
    facts = supervised.fit(
        training, config, at, images, test, 'student', interrupted, on_devices, seed=config.seed
    )
    if not facts:
        return {}
    student = model_folder.load_model(at)[1]
    classify = evaluate.classifier(run.plan, run.models.student, run.facts)
    predicted, _ = classify(run.plan.replicate(student), test, config.eval_batch_size)
    distilled = config.distil.epochs * epoch_steps * config.distil.batch_size
    summary = artifacts.summary(
        config,
        teacher_accuracy=teacher_accuracy,
        student_accuracy_last=facts['accuracy'],
        student_accuracy_best=facts['best_accuracy'],
        agreement_with_teacher=evaluate.accuracy(predicted, by_teacher),
        seconds=round(synthesis_seconds + facts['seconds'], 2),
        seconds_synthesis=round(synthesis_seconds, 2),
        seconds_distillation=facts['seconds'],
        images_synthesised=images.size,
        images_distilled=distilled,
        teacher_queries=synthesis_queries(config, run, teacher) + distilled,
        bank=str(bank),
    )
    history = metrics.read(at)
    history = {
        'round': history['round'],
        'student_accuracy': history['test_accuracy'],
        's/kd': history['loss'],
    }
    shown = _shown(bank, total, run)
    processes.by_first(
        lambda: artifacts.leave(
            workdir, config, run.facts, student, shown, history, summary, unit='epochs'
        )
    )
    print(
        f'student {name}: last {facts["accuracy"]:.2f} %, best {facts["best_accuracy"]:.2f} %, '
        f'agreement with the teacher {summary["agreement_with_teacher"]:.2f} %, '
        f'{synthesis_seconds:.0f} s of synthesis, {facts["seconds"]:.0f} s of distillation; see '
        f'{workdir / page.PAGE}',
        flush=True,
    )
    return summary


def synthesise(
    config: Any,
    workdir: Path,
    run: build.Run,
    teacher: dict[str, Any],
    interrupted: Callable[[], bool],
) -> float | None:
    """Fills ``workdir/bank``; returns the seconds it took in all, None when asked to stop."""
    bank, place, total = workdir / 'bank', workdir / 'synthesis', diffdfkd.trajectories(config)
    done, per_row = processes.broadcast_from_first(synthetic.count(bank)), config.log_every_rounds
    timer = place / 'seconds.json'
    cure = 'Remove it: the seconds until now are then not counted.'
    before = 0.0
    if processes.broadcast_from_first(timer.exists()):
        before = files.read_json(timer, cure).get('seconds', 0.0)
    processes.by_first(lambda: recover(place, bank, done, per_row, total))
    if done >= total:
        return before
    frozen = run.plan.replicate(Frozen(teacher=teacher, extra=conditions(config, run)))
    key_init, key_rounds = jax.random.split(jax.random.key(config.seed))
    state = run.plan.call(run.whole.init)(frozen, key_init)
    state = state.replace(round=jnp.asarray(done, jnp.int32))
    state = run.plan.replicate(state)
    phase = ConfigDict(dict(rounds=total, loops=1, g_steps=guided_steps(config), s_steps=0))
    trajectory = make_round(run.method, phase, run.plan)
    learn = learner(config, workdir, run, frozen.teacher, interrupted)
    processes.by_first(lambda: synthetic.describe(bank, description(config)))
    if done:
        print(f'continuing after trajectory {done} of {total}', flush=True)
    # What the batches since the last row of metrics.csv measured lies beside their images.
    pending = [synthetic.measured(bank, number) for number in range(done - done % per_row, done)]
    started = time.monotonic() - before

    def keep(number: int, image: Any, label: Any, row: dict[str, float], seconds: float) -> None:
        synthetic.write(bank, number, image, label, config.seed, row)
        files.write_json(timer, {'trajectories': number + 1, 'seconds': seconds})

    line = Progress(total, done, unit='trajectory')
    with metrics.Writer(place, done) as writer, contextlib.closing(line):
        while done < total and not interrupted():
            student = learn(done)
            if student is None:
                break
            if student:
                net = state.student.replace(**run.plan.replicate(student))
                state = state.replace(student=net)
            state, row = trajectory(frozen, state, jax.random.fold_in(key_rounds, done))
            [row] = artifacts.finite([row], done + 1, UNSTABLE.format(bank=bank))
            image = _kept_images(state.extra, diffdfkd.kept(config, done))
            label = np.full(len(image), done % config.data.num_classes)
            seconds = time.monotonic() - started
            # All go on once it is there: the training that follows reads it.
            processes.by_first(partial(keep, done, image, label, row, seconds))
            done += 1
            pending.append(row)
            if done % per_row == 0 or done == total:
                row = {name: float(np.mean([r[name] for r in pending])) for name in row}
                writer.write(done, {'seconds': seconds, **row})
                pending = []
            line.update(done, row, {'images_synthesised': done * config.synthesis.batch_size})
    if done < total:
        print(
            f'stopped after trajectory {done} of {total}; continue with the same command and '
            f'--workdir={workdir}',
            flush=True,
        )
        return None
    return time.monotonic() - started


def guided_steps(config: Any) -> int:
    """Steps of denoising on a trajectory; images of noise have none."""
    return 0 if config.synthesis.source == 'noise' else config.prior.steps - 1


def synthesis_queries(config: Any, run: build.Run, teacher: Any) -> int:
    """Images through the teacher, forward, before the distillation; none of a bank that was there.

    A trajectory's, in all trajectories, and the batches of the students in the loop.
    """
    if config.synthesis.bank:
        return 0
    frozen = Frozen(teacher=teacher, extra=conditions(config, run))
    phase = ConfigDict(dict(loops=1, g_steps=guided_steps(config), s_steps=0))
    [each] = build.queries(config, run.models, frozen, (phase,))
    in_loop = config.in_loop
    learnt = len(diffdfkd.sessions(config)) * in_loop.steps * in_loop.batch_size
    return each * diffdfkd.trajectories(config) + learnt


def description(config: Any) -> dict[str, Any]:
    """What a bank is of: what another run must agree to that takes it."""
    synthesis = config.synthesis
    names = ('source', 'per_class', 'batch_size', 'stored_size', 'intermediate')
    facts = {'dataset': config.data.name, 'classes': config.data.num_classes}
    facts |= {name: synthesis[name] for name in names}
    return facts | {'batches': diffdfkd.trajectories(config)}


def recover(place: Path, bank: Path, done: int, per_row: int, total: int) -> None:
    """Writes the rows of metrics.csv that a killed process had made the images of, but not written.

    Without their seconds, which nobody knows.
    """
    due = [number for number in range(1, done + 1) if number % per_row == 0 or number == total]
    with metrics.Writer(place, done) as writer:
        known = metrics.read(place).get('round', ())
        for number in due:
            if number not in known:
                first = (number - 1) // per_row * per_row
                rows = [synthetic.measured(bank, i) for i in range(first, number)]
                row = {name: float(np.mean([r[name] for r in rows])) for name in rows[0]}
                writer.write(number, row)


def learner(
    config: Any, workdir: Path, run: build.Run, teacher: Any, interrupted: Callable[[], bool]
) -> Callable[[int], dict[str, Any] | None]:
    """What trains the student that the adversarial term is held against.

    ``learn(done)`` returns the variables of the student of this moment where they are new, ``{}``
    where nothing changed, None when asked to stop.  A session begins with the student of the one
    before, and trains `in_loop.steps` batches (the repository: 20 epochs of what is there; with a
    fixed number one compiled program serves all sessions).
    """
    place, size = workdir / 'in_loop', config.synthesis.stored_size
    planned, learnt = diffdfkd.sessions(config), 0
    if not planned:
        return lambda done: {}
    name, steps = config.student.model, config.in_loop.steps
    training = supervised.prepare(config, 'in_loop', name, steps, distil=True)

    def trained(session: int) -> dict[str, Any] | None:
        """The student after a session; the one before is trained again if it is gone."""
        number = planned[session]
        at, start = place / f'{number:06d}', None
        if processes.broadcast_from_first((at / model_folder.FACTS).exists()):
            return model_folder.load_model(at)[1]
        if session:
            start = trained(session - 1)
            if start is None:
                return None
        images = synthetic.dataset(workdir / 'bank', number, run.facts, size)
        if not supervised.fit(
            training, config, at, images, None, 'in-loop student', interrupted, teacher, start,
            config.seed + number,
        ):  # fmt: skip
            return None
        return model_folder.load_model(at)[1]

    def learn(done: int) -> dict[str, Any] | None:
        nonlocal learnt
        past = [number for number in planned if number <= done]
        if not past or past[-1] == learnt:
            return {}
        student = trained(len(past) - 1)
        if student is None:
            return None
        learnt = past[-1]
        # A whole student is there: what it took to train it, and those long before, are not needed.
        if processes.first():
            shutil.rmtree(place / f'{learnt:06d}' / 'checkpoints', ignore_errors=True)
            for number in past[:-2]:
                shutil.rmtree(place / f'{number:06d}', ignore_errors=True)
        return student

    return learn


def conditions(config: Any, run: build.Run) -> diffdfkd.Prior:
    """The diffusion model's parameters, and the text states of the config's prompts."""
    prior, prompt = run.extra, config.prior.prompt
    if not prior:  # for images of noise
        return diffdfkd.Prior({}, ())
    text: Any = ()
    if prior.tokenize is not None:
        prompts = [prompt]
        if '{}' in prompt:
            names, number = run.facts.class_names, run.models.num_classes
            prompts = labels.sentences(prompt, config.data.name, names, number)
        text = prior.encode([*prompts, config.prior.negative])
    return diffdfkd.Prior(prior.frozen, text)


def _kept_images(extra: Any, number: int) -> np.ndarray:
    image = np.asarray(extra.image)[:number]
    if extra.intermediate is None:
        return image
    return np.concatenate([*np.asarray(extra.intermediate)[:, :number], image])


def _shown(bank: Path, total: int, run: build.Run) -> Batch:
    """Some images of every class, as networks see them."""
    classes = run.models.num_classes
    chosen: list[tuple[Any, Any]] = []
    for label in np.unique(np.linspace(0, classes - 1, page.MAX_CLASSES).round().astype(int)):
        images: list[np.ndarray] = []
        for number in range(int(label), total, classes):
            if len(images) < SHOWN:
                images += list(synthetic.read(bank, number)['image'][: SHOWN - len(images)])
        chosen += [(image, label) for image in images]
    image = np.stack([each for each, _ in chosen])
    mean, std = run.facts.mean, run.facts.std
    labels = jnp.asarray([label for _, label in chosen], jnp.int32)
    return Batch(data.normalise(image, mean, std), labels)
