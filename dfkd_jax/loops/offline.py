"""The loop for methods that sample from a diffusion model: all synthesis, then distillation.

    workdir/bank/          synthetic images (`data.synthetic`), a file for each trajectory
    workdir/synthesis/     the metrics of synthesis
    workdir/in_loop/       students trained on the images so far, if the method needs one
    workdir/distillation/  the student (`supervised.fit`): a model folder with its checkpoints

Killed at any moment, it continues to the same images and the same student.  Image files are whole
or absent.  A trajectory depends only on the run's seed, its number and the student of that time.
Trainings have their own checkpoints.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dfkd_jax import build, data, diffusion, evaluate, labels
from dfkd_jax.contract import Batch, Frozen, State
from dfkd_jax.data import synthetic
from dfkd_jax.distributed import processes
from dfkd_jax.loops import session, supervised
from dfkd_jax.loops.round import make_round
from dfkd_jax.methods.shared import trajectories
from dfkd_jax.reporting import artifacts, metrics, pictures
from dfkd_jax.reporting.classes import Tested
from dfkd_jax.storage import files, model_folder
from dfkd_jax.storage import workdir as folder
from dfkd_jax.storage.checkpoints import Restored

MOST_HELD_OUT = 5000  # images
SHOWN = 10  # images of each class in the picture that a run leaves


def distil(
    config: Any,
    workdir: Path,
    run: build.Run,
    test: data.Dataset | None,
    teacher: dict[str, Any],
    interrupted: Callable[[], bool],
) -> dict[str, Any]:
    """Synthesises into ``workdir/bank``, distils from it and leaves the results of every run.

    test: None: a part of the bank is held out from the student, and its agreement with the teacher
      there is measured in place of accuracy.
    Returns the summary.  Raises BankError for a damaged bank, or for another run's bank that is not
    full or not of this config; Stopped after saving; ConfigError and NonFiniteError.
    """
    on_devices = run.plan.replicate(teacher)
    of_teacher = evaluate.teacher(
        config, run.plan, run.models.teacher, on_devices, test,
        partial(build.stated_accuracy, config),
    )  # fmt: skip
    artifacts.warn(warnings := run.warnings | of_teacher.warnings)
    bank = files.expanded(config.synthesis.bank or workdir / 'bank')
    total = trajectories.count(config.synthesis, config.data.num_classes)
    # The distillation is checked before the synthesis, which may take hours.
    size = config.data.num_classes * config.synthesis.per_class
    held = 0 if test is not None else held_out_images(size)
    name, at = config.student.model, workdir / 'distillation'
    epoch_steps = (size - held) // config.distil.batch_size
    training = supervised.prepare(config, 'distil', name, epoch_steps, distil=True)
    synthesis_seconds = _fill(config, workdir, run, teacher, interrupted, bank)
    images = synthetic.dataset(bank, total, run.facts, config.synthesis.stored_size)
    train, score = images, 'accuracy'
    if test is None:
        train, test = held_out(config, run, on_devices, images, held)
        score = 'agreement'
    trained = supervised.fit(
        training, at, train, test, 'student', config.seed, interrupted, on_devices, score=score
    )
    agreement, tested = trained[score], None
    if of_teacher.accuracy is not None:
        tested = _tested(config, run, at, test, of_teacher)
        agreement = evaluate.accuracy(tested.student, of_teacher.predicted)
    distilled = config.distil.epochs * epoch_steps * config.distil.batch_size
    shown = _shown(bank, total, run)
    return artifacts.finish(
        workdir, config, run.facts, model_folder.load_model(at)[1], shown, supervised.curves(at),
        unit='epochs', tested=tested,
        **artifacts.scores(
            of_teacher.accuracy, trained[score], trained[f'best_{score}'], agreement
        ),
        seconds=round(synthesis_seconds + trained['seconds'], 2),
        seconds_synthesis=round(synthesis_seconds, 2),
        seconds_distillation=trained['seconds'],
        images_synthesised=images.size,
        images_distilled=distilled,
        teacher_queries=synthesis_queries(config, run, teacher) + distilled,
        bank=str(bank),
        warnings=warnings,
        **({'prior': diffusion.described(config.prior.path)} if run.extra else {}),
    )  # fmt: skip


def _fill(
    config: Any,
    workdir: Path,
    run: build.Run,
    teacher: dict[str, Any],
    interrupted: Callable[[], bool],
    bank: Path,
) -> float:
    """Synthesises what `bank` lacks, or checks one that another run has filled.

    Returns seconds.  Raises BankError, Stopped and NonFiniteError.
    """
    if config.synthesis.bank:
        synthetic.check(bank, description(config))
        total = trajectories.count(config.synthesis, config.data.num_classes)
        folder.keep_inputs(workdir, bank=synthetic.digest(bank, total))
        return 0.0
    if run.extra:
        folder.keep_inputs(workdir, prior=folder.digest(run.extra.frozen))
    return synthesise(config, workdir, run, teacher, interrupted)


def _tested(
    config: Any, run: build.Run, at: Path, test: Any, of_teacher: evaluate.OfTeacher
) -> Tested:
    """What the student of the folder `at` says of the test images, and the teacher."""
    student = run.plan.replicate(model_folder.load_model(at)[1])
    classify = evaluate.classifier(run.plan, run.models.student, run.facts)
    predicted, label = classify(student, test, config.eval_batch_size)
    return Tested(label, predicted, of_teacher.predicted)


def held_out_images(size: int) -> int:
    """How many of a bank's images are held out where there are no real ones: a tenth, not all."""
    return min(max(1, size // 10), MOST_HELD_OUT)


def held_out(
    config: Any, run: build.Run, teacher: Any, images: data.Dataset, number: int
) -> tuple[data.Dataset, data.Dataset]:
    """A bank's images to train on, and the `number` held out, labelled by the teacher.

    Which ones depends on the size of the bank alone.  The held-out ones are those that networks
    see: of `config.data.image_size` pixels.
    """
    order = np.random.default_rng(0).permutation(images.size)
    apart, rest = np.sort(order[:number]), np.sort(order[number:])
    test = images.part(apart)
    if config.synthesis.stored_size != config.data.image_size:
        test = test.resized(config.data.image_size)
    classify = evaluate.classifier(run.plan, run.models.teacher, run.facts)
    predicted, _ = classify(teacher, test, config.eval_batch_size)
    fetch = test.fetch
    labelled = test._replace(fetch=lambda i: (fetch(i)[0], predicted[i]), labels=predicted)
    return images.part(rest), labelled


def synthesise(
    config: Any,
    workdir: Path,
    run: build.Run,
    teacher: dict[str, Any],
    interrupted: Callable[[], bool],
) -> float:
    """Fills ``workdir/bank``; returns the seconds it took in all.  Raises Stopped."""
    place, plan = workdir / 'synthesis', run.plan
    total = trajectories.count(config.synthesis, config.data.num_classes)
    measured: dict[int, Any] = {}
    store = _Bank(config, workdir / 'bank', place / 'seconds.json', measured)
    if processes.broadcast_from_first(synthetic.count(store.folder)) >= total:
        return store.seconds()
    frozen = plan.replicate(Frozen(teacher=teacher, extra=conditions(config, run)))
    key_init, key_rounds = jax.random.split(jax.random.key(config.seed))
    phase = ConfigDict(dict(rounds=total, loops=1, g_steps=guided_steps(config), s_steps=0))
    trajectory = make_round(run.method, phase, plan)
    learn = learner(config, workdir, run, frozen.teacher, interrupted)
    processes.by_first(lambda: synthetic.describe(store.folder, description(config)))

    def advance(state: State, done: int) -> tuple[State, Any]:
        student = learn(done)
        if student:
            net = state.student.replace(**plan.replicate(student))
            state = state.replace(student=net)
        state, measured[done] = trajectory(frozen, state, jax.random.fold_in(key_rounds, done))
        return state, measured[done]

    work = session.Work(
        plan=plan,
        total=total,
        init=run.whole.init,
        inputs=(frozen, key_init),
        advance=advance,
        every=session.Every(log=config.log_every_rounds, measure=total, save=1),
        images=lambda done: done * config.synthesis.batch_size,
        unit='trajectory',
        advice=f'The images so far are in {store.folder}. Lower config.loss, or set '
        'config.prior.dtype=float32, in a new --workdir.',
        store=store._replace(init=lambda: plan.call(run.whole.init)(frozen, key_init)),
    )
    return session.run(work, place, interrupted)[1].seconds


class _Bank(NamedTuple):
    """The bank as the store of a synthesis: a file for each trajectory, and no state.

    measured: the metrics of the trajectories that are not saved yet, by number.
    """

    config: Any
    folder: Path
    timer: Path
    measured: dict[int, Any]
    init: Callable[[], State] | None = None

    def seconds(self) -> float:
        """The seconds that the trajectories so far took."""
        if not processes.broadcast_from_first(self.timer.exists()):
            return 0.0
        cure = 'Remove it: the seconds until now are then not counted.'
        return float(files.read_json(self.timer, cure).get('seconds', 0.0))

    def restore(self, like: Any) -> Restored | None:
        """The state before the first trajectory without a file; None if none has one."""
        del like  # a trajectory depends only on its number and the student of that time
        done = processes.broadcast_from_first(synthetic.count(self.folder))
        if not done or self.init is None:
            return None
        state = self.init().replace(round=jnp.asarray(done, jnp.int32))
        # The rows since the last one of metrics.csv; how often one is written may have changed.
        written = metrics.read(self.timer.parent)['round']
        first = processes.broadcast_from_first(int(max(written[written <= done], default=0)))
        rows = [synthetic.measured(self.folder, number) for number in range(first, done)]
        return Restored(done, state, {'seconds': self.seconds(), 'pending': rows})

    def save(self, done: int, state: Any, progress: dict[str, Any]) -> None:
        """Writes the images and the metrics of the last trajectory."""
        number = done - 1
        classes = self.config.data.num_classes
        kept = trajectories.kept_images(self.config.synthesis, classes, number)
        image = _kept_images(state.extra, kept)
        label = np.full(len(image), number % classes)
        row = {name: float(x) for name, x in jax.device_get(self.measured.pop(number)).items()}

        def write() -> None:
            synthetic.write(self.folder, number, image, label, self.config.seed, row)
            files.write_json(self.timer, {'trajectories': done, 'seconds': progress['seconds']})

        # All processes wait for the file, since the next training reads it.
        processes.by_first(write)


def guided_steps(config: Any) -> int:
    """Denoising steps of a trajectory; 0 for images of noise."""
    return 0 if config.synthesis.source == 'noise' else config.prior.steps - 1


def synthesis_queries(config: Any, run: build.Run, teacher: Any) -> int:
    """Images through the teacher, forward, before the distillation; 0 for an existing bank.

    These are the images of all trajectories and the batches of the in-loop students.
    """
    if config.synthesis.bank:
        return 0
    frozen = Frozen(teacher=teacher, extra=conditions(config, run))
    phase = ConfigDict(dict(loops=1, g_steps=guided_steps(config), s_steps=0))
    [each] = build.queries(config, run.models, frozen, (phase,))
    in_loop = config.in_loop
    learnt = len(in_loop_trainings(config)) * in_loop.steps * in_loop.batch_size
    return each * trajectories.count(config.synthesis, config.data.num_classes) + learnt


def in_loop_trainings(config: Any) -> list[int]:
    """The numbers of trajectories after which the student in the loop trains."""
    return trajectories.in_loop_trainings(
        config.synthesis, config.in_loop, config.loss.adversarial, config.data.num_classes
    )


def description(config: Any) -> dict[str, Any]:
    """What a bank holds.  A run that takes an existing bank must agree with it."""
    synthesis = config.synthesis
    names = ('source', 'per_class', 'batch_size', 'stored_size', 'intermediate')
    facts = {'dataset': config.data.name, 'classes': config.data.num_classes}
    facts |= {name: synthesis[name] for name in names}
    return facts | {'batches': trajectories.count(synthesis, config.data.num_classes)}


def learner(
    config: Any, workdir: Path, run: build.Run, teacher: Any, interrupted: Callable[[], bool]
) -> Callable[[int], dict[str, Any]]:
    """Trains the in-loop student, which the adversarial loss needs.

    ``learn(done)`` returns the student's variables after `done` trajectories if they are new, else
    ``{}``.  A session starts from the student of the previous one and trains `in_loop.steps`
    batches.  (The authors' repository trains 20 epochs of the images so far; with a fixed number
    one compiled program serves all sessions.)  It raises Stopped as any training does.
    """
    place, size = workdir / 'in_loop', config.synthesis.stored_size
    planned, learnt = in_loop_trainings(config), 0
    if not planned:
        return lambda done: {}
    name, steps = config.student.model, config.in_loop.steps
    training = supervised.prepare(config, 'in_loop', name, steps, distil=True)

    def trained(number: int) -> dict[str, Any]:
        """The student after a session; the previous one is trained again if it is gone."""
        at, start = place / f'{planned[number]:06d}', None
        if not processes.broadcast_from_first((at / model_folder.CARD).exists()):
            if number:
                start = trained(number - 1)
            images = synthetic.dataset(workdir / 'bank', planned[number], run.facts, size)
            seed = config.seed + planned[number]
            supervised.fit(
                training, at, images, None, 'in-loop student', seed, interrupted, teacher, start
            )
        return model_folder.load_model(at)[1]

    def learn(done: int) -> dict[str, Any]:
        nonlocal learnt
        past = [number for number in planned if number <= done]
        if not past or past[-1] == learnt:
            return {}
        student = trained(len(past) - 1)
        learnt = past[-1]
        # The student is complete: its checkpoints and much older students are not needed.
        if processes.first():
            shutil.rmtree(place / f'{learnt:06d}' / 'checkpoints', ignore_errors=True)
            for number in past[:-2]:
                shutil.rmtree(place / f'{number:06d}', ignore_errors=True)
        return student

    return learn


def conditions(config: Any, run: build.Run) -> trajectories.FrozenPrior:
    """The diffusion model's parameters, and the text states of the config's prompts."""
    prior, prompt = run.extra, config.prior.prompt
    if not prior:  # for images of noise
        return trajectories.FrozenPrior({}, ())
    text: Any = ()
    if prior.tokenize is not None:
        prompts = [prompt]
        if '{}' in prompt:
            names, number = run.facts.class_names, run.models.num_classes
            prompts = labels.sentences(prompt, config.data.name, names, number)
        text = prior.encode([*prompts, config.prior.negative])
    return trajectories.FrozenPrior(prior.frozen, text)


def _kept_images(extra: Any, number: int) -> np.ndarray:
    image = np.asarray(extra.image)[:number]
    if extra.intermediate is None:
        return image
    return np.concatenate([*np.asarray(extra.intermediate)[:, :number], image])


def _shown(bank: Path, total: int, run: build.Run) -> Batch:
    """Some images of every class, normalised."""
    classes = run.models.num_classes
    chosen: list[tuple[Any, Any]] = []
    for label in np.unique(np.linspace(0, classes - 1, pictures.MAX_CLASSES).round().astype(int)):
        images: list[np.ndarray] = []
        for number in range(int(label), total, classes):
            if len(images) < SHOWN:
                images += list(synthetic.read(bank, number)['image'][: SHOWN - len(images)])
        chosen += [(image, label) for image in images]
    image = np.stack([each for each, _ in chosen])
    mean, std = run.facts.mean, run.facts.std
    labels = jnp.asarray([label for _, label in chosen], jnp.int32)
    return Batch(data.normalise(image, mean, std), labels)
