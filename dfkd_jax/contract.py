"""The contract between a data-free distillation method and the loop that runs it.

A method file exposes one function, ``make(config, models, shards) -> Method``.  Everything a method
does is a pure function of ``(frozen, state, key)``, so that fusing steps into one program, sharding
the batch, killing a run and resuming it need nothing from the method.

Shapes: ``B`` is the number of images an instance works on (``Shards.local``), ``C`` the number of
classes.  Arrays are channels-last; images are in the range the teacher expects (normalised).
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from flax import struct

Array = jax.Array
Key = jax.Array  # a typed PRNG key, `jax.random.key`; a function that takes one consumes it
Params = Any  # a nested dict of arrays
Metrics = dict[
    str, Array
]  # flat, scalars, averaged over shards; `g/...` synthesis, `s/...` student


class Net(struct.PyTreeNode):
    """A network in training: what its optimiser and its batch norms need."""

    params: Params
    batch_stats: Params
    opt_state: optax.OptState

    @property
    def variables(self) -> dict[str, Params]:
        """What `module.apply` takes."""
        return {'params': self.params, 'batch_stats': self.batch_stats}


class State(struct.PyTreeNode):
    """All that changes in a run, and all that a checkpoint holds.

    generator: a `Net`, or ``()`` for a method that trains none.
    extra: the method's own pytree, a dataclass defined in the method's file; ``()`` if none.
    """

    round: Array  # [] int32
    student: Net
    generator: Any
    extra: Any = ()


class Frozen(struct.PyTreeNode):
    """What a run reads and never changes: an argument of every step, neither donated nor saved.

    teacher: the teacher's variables, ``{'params': ..., 'batch_stats': ...}``.
    extra: whatever else a method wants frozen (label embeddings, a diffusion prior).
    """

    teacher: dict[str, Params]
    extra: Any = ()


class Batch(NamedTuple):
    """Synthetic images and the classes they were made for."""

    image: Array  # [B, H, W, channels], normalised
    label: Array  # [B] int32


class Models(NamedTuple):
    """The networks' shapes (linen modules, no weights) and the task they share."""

    teacher: Any
    student: Any
    generator: Any  # None for a method that trains none
    num_classes: int
    image_shape: tuple[int, int, int]  # (H, W, channels)
    mean: tuple[float, ...]  # per channel, of images in [0, 1]
    std: tuple[float, ...]
    prior: Any = None  # a diffusion model's pure functions, for a method that samples from one

    def normalise(self, pixel: Array) -> Array:
        """Pixels in [0, 1], [B, H, W, channels], as the networks see them."""
        return (pixel - per_channel(self.mean)) / per_channel(self.std)

    def pixels(self, image: Array) -> Array:
        """The pixels of normalised images [B, H, W, channels]; not clipped."""
        return per_channel(self.mean) + per_channel(self.std) * image


def per_channel(values: tuple[float, ...]) -> Array:
    """One value for each channel, as [1, 1, 1, channels]."""
    return jnp.asarray(values, jnp.float32).reshape(1, 1, 1, -1)


class InitFn(Protocol):
    """Makes the state of round 0.  The key is consumed."""

    def __call__(self, frozen: Frozen, key: Key) -> State: ...


class StepFn(Protocol):
    """Advances the state once: the body of a scan, once `frozen` is bound.  The key is consumed.

    Returns a state of the same structure, shapes and dtypes, and scalar metrics.
    """

    def __call__(self, frozen: Frozen, state: State, key: Key) -> tuple[State, Metrics]: ...


class SampleFn(Protocol):
    """Draws the synthetic images that the student would train on now.  The key is consumed."""

    def __call__(self, frozen: Frozen, state: State, key: Key) -> Batch: ...


def unchanged(frozen: Frozen, state: State, key: Key) -> tuple[State, Metrics]:
    """The step of a method that has nothing to do there."""
    del frozen, key
    return state, {}


class Method(NamedTuple):
    """A data-free distillation method: six pure functions over one `State`.

    One batch of synthesis is `begin`, then n `generator_step`s, then `finish`; the student then
    takes m `student_step`s.  How many of each is the phase's business, not the method's.
    """

    init: InitFn
    generator_step: StepFn  # one synthesis update
    student_step: StepFn  # one distillation update
    sample: SampleFn
    begin: StepFn = unchanged  # start a batch: new latents, a new noisy layer, a new generator
    finish: StepFn = unchanged  # end a batch: the best images to the bank, a meta-update


def start(params: Params, batch_stats: Params, tx: optax.GradientTransformation) -> Net:
    """A network before its first update."""
    return Net(params, batch_stats, tx.init(params))


def update(
    net: Net, grads: Params, tx: optax.GradientTransformation, batch_stats: Params = None
) -> Net:
    """One optimiser update; `batch_stats` replaces the running statistics if given."""
    updates, opt_state = tx.update(grads, net.opt_state, net.params)
    return net.replace(
        params=optax.apply_updates(net.params, updates),
        batch_stats=net.batch_stats if batch_stats is None else batch_stats,
        opt_state=opt_state,
    )


def warmup_rounds(phases: Any) -> int:
    """Rounds of a run before the student's first step."""
    rounds = 0
    for phase in phases:
        if phase.s_steps:
            break
        rounds += phase.rounds
    return rounds


def sgd_by_round(student: Any, phases: Any) -> optax.GradientTransformation:
    """SGD with momentum; a cosine from `lr` to `final_lr`, constant within a round.

    student, phases: the config's.  Raises ValueError unless all phases after the warm-up, one at
    least, have the same number of student steps.
    """
    steps = [phase.s_steps for phase in phases if phase.s_steps]
    if len(set(steps)) != 1:
        raise ValueError(
            f'config.phases have {steps} student steps: the student anneals by the round, so all '
            'phases after the warm-up need the same number, and one phase at least.'
        )
    rounds = sum(phase.rounds for phase in phases) - warmup_rounds(phases)
    cosine = optax.schedules.cosine_decay_schedule(
        student.lr, rounds, student.final_lr / student.lr
    )
    return optax.chain(
        optax.add_decayed_weights(student.weight_decay),
        optax.sgd(lambda step: cosine(step // steps[0]), momentum=student.momentum),
    )


def first_round() -> Array:
    """The round counter of a new state."""
    return jnp.zeros((), jnp.int32)
