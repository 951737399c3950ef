"""Accuracy on real test images, and agreement with the teacher.  Measures; never trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dfkd_jax import data
from dfkd_jax.parallel import Plan


def classifier(
    plan: Plan, module: Any, facts: data.Facts
) -> Callable[[Any, data.Dataset, int], tuple[np.ndarray, np.ndarray]]:
    """A function ``(variables, dataset, batch_size) -> (predicted, label)``, both [N] int32."""

    def predict(variables: Any, images: jax.Array) -> jax.Array:
        x = data.normalise(images, facts.mean, facts.std)
        return jnp.argmax(module.apply(variables, x).logits, axis=-1).astype(jnp.int32)

    compiled = plan.predict(predict)

    def classify(
        variables: Any, dataset: data.Dataset, batch_size: int
    ) -> tuple[np.ndarray, np.ndarray]:
        batch_size += -batch_size % plan.shards.size  # rows divide over the devices
        # Every batch is under way before the first answer is waited for.
        pending = [
            (compiled(variables, batch.image), batch.label, batch.valid)
            for batch in dataset.batches(batch_size)
        ]
        predicted = [np.asarray(answer)[valid] for answer, _, valid in pending]
        label = [label[valid] for _, label, valid in pending]
        return np.concatenate(predicted), np.concatenate(label)

    return classify


def accuracy(predicted: np.ndarray, label: np.ndarray) -> float:
    """Per cent of equal entries, 0 to 100."""
    return 100.0 * float(np.mean(predicted == label))
