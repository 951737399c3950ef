"""What all measurements share: the recipe of a training, its loop, and what a result holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dfkd_jax import contract
from dfkd_jax.distributed import sharding
from dfkd_jax.errors import ConfigError, NonFiniteError
from dfkd_jax.loops import supervised
from dfkd_jax.storage import files
from dfkd_jax.storage import workdir as folders
from dfkd_jax.transfer.network import Network


class Recipe(NamedTuple):
    """SGD and one cosine to zero; the fields are those of a config's group `teach`.

    crop_padding, flip: None: what suits the data set.
    """

    epochs: int = 20
    batch_size: int = 64
    lr: float = 0.02
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    warmup_epochs: float = 0.0
    final_lr: float = 0.0
    milestones: tuple[int, ...] = ()
    random_resized_crop: bool = False
    shade: float = 0.0
    cutmix: float = 0.0
    crop_padding: int | None = None
    flip: bool | None = None


def check_recipe(recipe: Recipe) -> None:
    """Raises ConfigError for epochs or batches of nothing."""
    if min(recipe.epochs, recipe.batch_size) < 1:
        raise ConfigError(
            f'{recipe.epochs} epochs of batches of {recipe.batch_size}: expected 1 or more.'
        )


def check_batch(recipe: Recipe, size: int, images: str) -> None:
    """Raises ConfigError where a batch is larger than the `size` training images."""
    if size < recipe.batch_size:
        raise ConfigError(
            f'a batch of {recipe.batch_size} images is larger than the {size} {images}: lower '
            '--batch_size.'
        )


def start(plan: sharding.Plan, params: Any, batch_stats: Any, tx: Any) -> supervised.State:
    """The state of a training that begins with these weights, on the devices."""
    # Copies: a step donates its state, and the caller keeps the weights it gave.
    params, batch_stats = jax.tree.map(jnp.array, (params, batch_stats))
    net = contract.start(params, batch_stats, tx)
    return plan.replicate(supervised.State(jnp.zeros((), jnp.int32), net))


def train(
    step: Callable,
    frozen: Any,
    state: supervised.State,
    inputs: Iterator[Any],
    recipe: Recipe,
    epoch_steps: int,
    measure: Callable[[supervised.State], dict[str, float]] = lambda state: {},
) -> tuple[supervised.State, list[dict[str, float]]]:
    """Trains for the recipe's epochs; returns the state and, for each epoch, a row of numbers.

    A row has the mean ``loss`` of an epoch, and what `measure` says of the state after it.

    step: compiled, ``(frozen, state, inputs) -> (state, metrics)``; it takes over the state.
    Raises NonFiniteError where the loss is not finite.
    """
    history = []
    for epoch in range(1, recipe.epochs + 1):
        losses = []
        # The range first: zip must not draw the batch after the last.
        for _, each in zip(range(epoch_steps), inputs, strict=False):
            state, metrics = step(frozen, state, each)
            losses.append(metrics['loss'])
        loss = float(np.mean(jax.device_get(losses)))
        if not np.isfinite(loss):
            raise NonFiniteError(f'loss is {loss} in epoch {epoch}: lower --lr.')
        history.append({'loss': loss, **measure(state)})
    return state, history


# --- Results -------------------------------------------------------------------------------


def check_output(output: str | Path | None) -> None:
    """Raises ConfigError where the file of the result exists."""
    if output and files.expanded(output).exists():
        raise ConfigError(f'{output} is there already: remove it, or give another --output.')


def write(
    output: str | Path | None, network: Network, student: str | Path, **measured: Any
) -> dict[str, Any]:
    """Returns the result, and writes it to `output` as JSON if given.

    The result is what was `measured`, of which network, where, and by which versions.
    """
    card = network.card
    result = {
        **measured,
        'source': str(student),
        'source_dataset': card['dataset'],
        'source_accuracy': card.get('accuracy'),
        **{name: card.get(name) for name in ('model', 'role', 'variables_sha256')},
        'versions': folders.versions() | measured.get('versions', {}),
        'device': folders.device(),
    }
    if output:
        files.write_json(files.expanded(output), result)
    return result
