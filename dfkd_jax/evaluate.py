"""Accuracy on real test images, and agreement with the teacher.  Nothing here trains.

Without real images, the agreement is measured on synthetic ones that the student never trains on.
That is no accuracy: it says how well the student has learnt the teacher's answers on images such as
it was taught with, and nothing of how right they are, or of other images.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dfkd_jax import data
from dfkd_jax.distributed.sharding import Plan


def over(
    plan: Plan, fn: Callable[[Any, jax.Array], jax.Array], facts: data.Facts
) -> Callable[[Any, data.Dataset, int], tuple[np.ndarray, np.ndarray]]:
    """Compiles `fn`, ``(variables, normalised images [B, H, W, C]) -> [B, ...]``, for data sets.

    Returns a function ``(variables, dataset, batch_size) -> (outputs [N, ...], label [N] int32)``,
    in stored order.
    """

    def normalised(variables: Any, batch: Any) -> Any:
        images, label = batch
        # The labels pass through too: a process reads only those of its own images.
        return fn(variables, data.normalise(images, facts.mean, facts.std)), label

    compiled = plan.predict(normalised)

    def call(
        variables: Any, dataset: data.Dataset, batch_size: int
    ) -> tuple[np.ndarray, np.ndarray]:
        batch_size += -batch_size % plan.shards.size  # rows must divide over the devices
        # Dispatches every batch before waiting for the first result.
        pending = [
            compiled(variables, (batch.image, batch.label))
            for batch in dataset.batches(batch_size, plan.rows(batch_size))
        ]
        # The last batch is padded at its end.
        said, label = (
            np.concatenate([np.asarray(found[i]) for found in pending])[: dataset.size]
            for i in range(2)
        )
        return said, label

    return call


def classifier(
    plan: Plan, module: Any, facts: data.Facts
) -> Callable[[Any, data.Dataset, int], tuple[np.ndarray, np.ndarray]]:
    """`over`, for the class that a network predicts: ``(predicted, label)``, both [N] int32."""

    def predict(variables: Any, images: jax.Array) -> jax.Array:
        return jnp.argmax(module.apply(variables, images).logits, axis=-1).astype(jnp.int32)

    return over(plan, predict, facts)


HELD_OUT = 1000  # synthetic images, where agreement is measured on them


def on_synthetic(
    plan: Plan, teacher: Any, student: Any
) -> Callable[[Any, Any, np.ndarray], np.ndarray]:
    """Compiles the comparison of two networks on normalised images.

    Returns ``(teacher's variables, student's variables, images [B, H, W, C]) -> agree [B] bool``,
    where B divides over the devices.
    """

    def same(variables: Any, images: jax.Array) -> jax.Array:
        logits = [
            module.apply(v, images).logits
            for module, v in zip((teacher, student), variables, strict=True)
        ]
        return jnp.argmax(logits[0], axis=-1) == jnp.argmax(logits[1], axis=-1)

    compiled = plan.predict(same)

    def call(of_teacher: Any, of_student: Any, images: np.ndarray) -> np.ndarray:
        return np.asarray(compiled((of_teacher, of_student), images[plan.rows(len(images))]))

    return call


FAR = 3.0  # per cent of test images, between what a teacher's file states and what is measured


class OfTeacher(NamedTuple):
    """A teacher on test images, where there are any, and what is to be told of it, by name."""

    predicted: np.ndarray = np.zeros(0, np.int32)  # [N]
    accuracy: float | None = None  # per cent
    warnings: dict[str, str] = {}


def teacher(
    config: Any,
    plan: Plan,
    module: Any,
    variables: Any,
    test: data.Dataset | None,
    stated: Callable[[], float | None] = lambda: None,
) -> OfTeacher:
    """Evaluates the teacher on the test images and prints its accuracy.

    A run does this first, so a wrong port or normalisation shows within seconds.

    stated: reads the accuracy in per cent that its file states, if it does.
    """
    if test is None:
        return OfTeacher()
    predicted, label = classifier(plan, module, test.facts)(variables, test, config.eval_batch_size)
    share = accuracy(predicted, label)
    print(
        f'teacher {config.teacher.model}: {share:.2f} % of the {test.size} test images of '
        f'{config.data.name}',
        flush=True,
    )
    claim = stated()
    if claim is None or share > claim - FAR:
        return OfTeacher(predicted, share)
    told = (
        f'the file of the teacher states an accuracy of {claim:.2f} %, and here it is '
        f'{share:.2f} %. Most often images were normalised otherwise in its training: set '
        '--config.data.mean and --config.data.std to its constants. Many CIFAR checkpoints have '
        "those of ImageNet, '(0.485,0.456,0.406)' and '(0.229,0.224,0.225)'. Else see whether it "
        f'was trained on {config.data.name}, at this size.'
    )
    return OfTeacher(predicted, share, {'teacher_unlike_its_file': told})


def accuracy(predicted: np.ndarray, label: np.ndarray) -> float:
    """The share of equal entries, in per cent."""
    return 100.0 * float(np.mean(predicted == label))
