"""Reads a run, its teacher and the real images, attacks them, and writes what was found."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dfkd_jax import build, data, evaluate
from dfkd_jax.audit import membership, scores, table
from dfkd_jax.data import synthetic
from dfkd_jax.deploy import student as students
from dfkd_jax.deploy import synthetic_images
from dfkd_jax.deploy.student import Student
from dfkd_jax.distributed import sharding
from dfkd_jax.errors import ConfigError, DataError
from dfkd_jax.storage import files
from dfkd_jax.storage import workdir as folder

FILE, TABLE = 'audit.json', 'audit.md'  # in the folder of the run
IMAGES = 10_000  # of each kind, where there are more
BATCH = 250


class Subject(NamedTuple):
    """A finished run, whose config says where things are now."""

    run: Path
    config: Any
    student: Student
    teacher: dict[str, Any]  # its variables


class Pair(NamedTuple):
    """Of members and of others, which the teacher was and was not trained on."""

    members: Any
    others: Any


class Answers(NamedTuple):
    """What a network says of images."""

    logits: np.ndarray  # [N, C]
    features: np.ndarray  # [N, F], the input of its last linear layer
    label: np.ndarray  # [N] int32


def run(
    place: str | Path,
    data_dir: str | None = None,
    dataset: str | None = None,
    teacher: str | None = None,
    images: int = IMAGES,
    seed: int = 0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Audits the finished run in `place`; writes and returns what ``audit.json`` holds.

    data_dir, dataset, teacher: where the images and the teacher's file are, and what the images are
      called, where that is not what the run's config says.
    images: at most so many members, others and synthetic images, drawn by `seed`.
    overwrite: replace the audit that is there.
    Raises ConfigError, DataError, DeployError, PortError or CheckpointError, before anything is
    compiled: for a run without a student or another teacher, for an audit that is there, and for
    images that are missing, too few or of other classes.
    """
    path = files.expanded(place)
    if images < membership.LEAST or seed < 0:
        raise ConfigError(
            f'--images={images} --seed={seed}: expected {membership.LEAST} images or more, and a '
            'seed of 0 or more.'
        )
    subject = _subject(path, data_dir, dataset, teacher)
    target = _target(subject.run, overwrite)
    config, student = subject.config, subject.student
    real = _real(config.data, images, seed)
    print(
        f'measuring on {real.members.size} training and {real.others.size} test images of '
        f'{config.data.name}; this takes minutes on a CPU',
        flush=True,
    )
    start = time.monotonic()
    found = {
        'run': {'method': config.method, 'seed': config.seed},
        'student': _about(student.card.model, student.variables),
        'teacher': _about(config.teacher.model, subject.teacher),
        'images': {
            'dataset': config.data.name,
            'version': real.members.facts.version,
            'members': real.members.size,
            'others': real.others.size,
        },
        'settings': {
            'images': images,
            'seed': seed,
            'replicates': membership.REPLICATES,
            'confidence': membership.CONFIDENCE,
        },
        **_attacks(subject, real, images, seed),
        'device': folder.device(),
        'versions': folder.versions(),
        'seconds': round(time.monotonic() - start, 1),
    }
    files.write_bytes(target.with_name(TABLE), table.render(found).encode())
    files.write_json(target, found)  # last: with it, the audit is whole
    return found


# 1. What is read, and refused.


def _subject(path: Path, data_dir: str | None, dataset: str | None, teacher: str | None) -> Subject:
    """The run in a folder.  Raises ConfigError where it has no student or another teacher."""
    student = students.load(path)
    run, config = student.run, student.config
    if run is None or config is None or student.folder != path / 'student':
        raise ConfigError(
            f'{path} is a network without the run that distilled it: expected the --workdir of a '
            'finished run, whose student is compared with its teacher.'
        )
    config, card = config.copy_and_resolve_references(), student.card
    # Prepared as for the student, whatever the data set is called here.
    config.data.update(mean=card.mean, std=card.std, resize=card.resize)
    config.data.data_dir = data_dir or config.data.data_dir
    config.data.name = dataset or config.data.name
    config.teacher.checkpoint = teacher or config.teacher.checkpoint
    if not config.data.name:
        raise ConfigError(
            f'the run in {path} names no data set: give --dataset=NAME, of the images that its '
            'teacher was trained on, prepared by `python -m dfkd_jax.data prepare`.'
        )
    return Subject(run, config, student._replace(config=config), _teacher(run, config))


def _teacher(run: Path, config: Any) -> dict[str, Any]:
    """The variables of a run's teacher.  Raises ConfigError for those of another one."""
    place = config.teacher.checkpoint or run / 'teacher'
    variables = synthetic_images.teacher(run, config)
    inputs = run / folder.INPUTS
    known = files.read_json(inputs).get('teacher') if inputs.is_file() else None
    if known not in (None, folder.digest(variables)):
        raise ConfigError(
            f'the teacher in {place} is not the one that the run in {run} had (sha256 '
            f'{known[:12]}...): give --teacher=FILE.'
        )
    return variables


def _target(run: Path, overwrite: bool) -> Path:
    """The file to write.  Raises ConfigError where an audit is there already."""
    there = [path for path in (run / FILE, run / TABLE) if path.exists()]
    if there and not overwrite:
        raise ConfigError(f'{there[0]} is there already: read it, or --overwrite to replace it.')
    return run / FILE


def _real(settings: Any, number: int, seed: int) -> Pair:
    """At most `number` training and test images, drawn by the seed.  Raises DataError."""
    facts = data.check(settings, ('test',))
    for split, size in (('training', facts.train_size), ('test', facts.test_size)):
        if size < membership.LEAST:
            raise DataError(
                f'{settings.name} has {size or "no"} {split} images there, and members are told '
                f'from others with {membership.LEAST} or more of each: prepare the whole data set '
                'that the teacher was trained on, and give --data_dir=DIR.'
            )
    draw = np.random.default_rng(seed).permutation

    def part(split: data.Dataset) -> data.Dataset:
        return split.part(np.sort(draw(split.size)[:number]))

    return Pair(part(data.load(settings, 'train')), part(data.load(settings, 'test')))


def _about(model: str, variables: Any) -> dict[str, str]:
    return {'model': model, 'sha256': folder.digest(variables)}


# 2. The attacks.


def _attacks(subject: Subject, real: Pair, number: int, seed: int) -> dict[str, Any]:
    """All attacks with their figures, the accuracies, and how many synthetic images there were."""
    config, student, plan = subject.config, subject.student, sharding.make('jit')
    facts, given = real.members.facts, config.teacher.checkpoint
    module = build.make_classifier(config.teacher.model, config.data, checkpoint=given)
    of_teacher = _answering(plan, module, subject.teacher, facts)
    module = build.make_classifier(student.card.model, config.data)
    of_student = _answering(plan, module, student.variables, facts)
    answers = {
        name: Pair(*map(of, real))
        for name, of in (('teacher', of_teacher), ('student', of_student))
    }
    attacks = []
    for name, pair in answers.items():
        logit = Pair(*(scores.true_class_logit(each.logits, each.label) for each in pair))
        losses = Pair(*map(scores.loss, logit))
        attacks.append(_attack(f'loss of the {name}', 'nats', logit, losses, seed))
    reason = _without_images(subject)
    images = None if reason else synthetic_images.banked(student, number, seed)
    if images is not None:
        attacks += _by_distance(of_teacher, answers['teacher'], real, images, seed)
    return {
        'attacks': attacks,
        'accuracy': {name: _accuracy(pair)._asdict() for name, pair in answers.items()},
        'synthetic_images': 0 if images is None else len(images),
        'without_synthetic_images': reason,
    }


def _accuracy(pair: Pair) -> Pair:
    """In per cent."""
    return Pair(*(evaluate.accuracy(np.argmax(each.logits, axis=1), each.label) for each in pair))


def _answering(
    plan: sharding.Plan, module: Any, variables: Any, facts: data.Facts
) -> Callable[[data.Dataset], Answers]:
    """Compiles a network: ``data set -> Answers``."""

    def say(variables: Any, images: jax.Array) -> jax.Array:
        out = module.apply(variables, images)
        return jnp.concatenate([out.logits, out.features], axis=1)

    call, placed = evaluate.over(plan, say, facts), plan.replicate(variables)

    def answers(images: data.Dataset) -> Answers:
        said, label = call(placed, images, BATCH)
        classes = facts.num_classes
        return Answers(said[:, :classes], said[:, classes:], label)

    return answers


def _without_images(subject: Subject) -> str:
    """Why a run has no synthetic images to attack; '' where it has some."""
    run, config = subject.run, subject.config
    if config.loop == 'alternating':
        return (
            '' if (run / 'checkpoints').is_dir() else f'no synthetic images: no {run}/checkpoints'
        )
    if config.loop == 'offline':
        bank = files.expanded(config.synthesis.bank or run / 'bank')
        return '' if synthetic.count(bank) else f'no synthetic images: none in {bank}'
    return f'no synthetic images: {config.method} distils on real ones'


def _by_distance(
    of_teacher: Callable[[data.Dataset], Answers],
    answers: Pair,
    real: Pair,
    images: np.ndarray,
    seed: int,
) -> list[dict[str, Any]]:
    """The attacks on synthetic images, [K, H, W, channels] uint8, and their control."""
    facts, label = real.members.facts, np.zeros(len(images), np.int32)
    bank = data.Dataset(facts, len(images), lambda i: (images[i], label[i]), images, label)
    known = of_teacher(bank).features
    members, others = (each.features for each in answers)
    pixels = (each.fetch(np.arange(each.size))[0] for each in real)
    # The control: a teacher treats its training images otherwise whatever they are compared with.
    # Test images tell nothing of members, and either kind has as many of them for neighbours.
    near = {
        'pixels, nearest synthetic image': Pair(
            *(scores.nearest(each, images) / 255 for each in pixels)
        ),
        "teacher's features, nearest synthetic image": Pair(
            *(scores.nearest(each, known) for each in (members, others))
        ),
        "control: teacher's features, nearest other test image": Pair(
            scores.nearest(members, others[1:]), scores.nearest(others, others, itself=True)
        ),
    }
    return [
        _attack(name, 'Euclidean distance', Pair(*(-each for each in pair)), pair, seed)
        for name, pair in near.items()
    ]


def _attack(name: str, unit: str, score: Pair, measured: Pair, seed: int) -> dict[str, Any]:
    """One attack: the figures of its scores, and the means of what they are made of."""
    found = membership.figures(*score, seed)
    return {
        'score': name,
        'unit': unit,
        'mean_of_members': float(np.mean(measured.members)),
        'mean_of_others': float(np.mean(measured.others)),
        **{figure: estimate._asdict() for figure, estimate in found.items()},
    }
