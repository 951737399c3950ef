"""The contract between a data-free distillation method and the loop that runs it.

A method's file has one public function, ``make(config, models, shards) -> Method``.  All that a
method does is a pure function of ``(frozen, state, key)``.  So the library can fuse steps into one
program, shard the batch, and kill and resume a run without the method's help.

Shapes: ``B`` is the number of images on one shard (``Shards.local``), ``C`` the number of classes.
Arrays are channels-last.  Images are normalised, as the teacher expects them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from flax import struct

Array = jax.Array
Key = jax.Array  # a typed PRNG key, `jax.random.key`; a function that takes one consumes it
Params = Any  # a nested dict of arrays
# Scalars by name, averaged over shards: `g/...` of synthesis, `s/...` of the student.
Metrics = dict[str, Array]


class Net(struct.PyTreeNode):
    """A network in training: its weights, batch statistics and optimiser state."""

    params: Params
    batch_stats: Params
    opt_state: optax.OptState

    @property
    def variables(self) -> dict[str, Params]:
        """The variables that `module.apply` takes."""
        return {'params': self.params, 'batch_stats': self.batch_stats}


class State(struct.PyTreeNode):
    """Everything that changes during a run, which is what a checkpoint holds.

    generator: a `Net`, or ``()`` if the method trains none.
    extra: the method's own pytree, a dataclass from the method's file; ``()`` if none.
    """

    round: Array  # [] int32
    student: Net
    generator: Any
    extra: Any = ()


class Frozen(struct.PyTreeNode):
    """What a run reads and never changes: an argument of every step, neither donated nor saved.

    teacher: the teacher's variables, ``{'params': ..., 'batch_stats': ...}``.
    extra: what else the method reads (label embeddings, a diffusion prior).
    """

    teacher: dict[str, Params]
    extra: Any = ()


class Batch(NamedTuple):
    """Synthetic images and the classes they were made for."""

    image: Array  # [B, H, W, channels], normalised
    label: Array  # [B] int32


class Models(NamedTuple):
    """The networks (linen modules without weights) and the task that they share."""

    teacher: Any
    student: Any
    generator: Any  # None if the method trains none
    num_classes: int
    image_shape: tuple[int, int, int]  # (H, W, channels)
    mean: tuple[float, ...]  # per channel, of images in [0, 1]
    std: tuple[float, ...]
    prior: Any = None  # a diffusion model's pure functions, if the method samples from one
    # Whether a bank keeps a part of its images from the student, since there are no real ones to
    # measure on (`Method.held_out`).
    hold_out: bool = False

    def normalise(self, pixel: Array) -> Array:
        """Normalises pixels in [0, 1], [B, H, W, channels], for the networks."""
        return (pixel - per_channel(self.mean)) / per_channel(self.std)

    def pixels(self, image: Array) -> Array:
        """The pixels of normalised images [B, H, W, channels], not clipped."""
        return per_channel(self.mean) + per_channel(self.std) * image


def per_channel(values: tuple[float, ...]) -> Array:
    """One value per channel, as [1, 1, 1, channels]."""
    return jnp.asarray(values, jnp.float32).reshape(1, 1, 1, -1)


class Phase(Protocol):
    """One of `config.phases`: `rounds` times, batches of synthesis and then the student."""

    rounds: int
    loops: int  # batches of synthesis a round
    g_steps: int  # generator steps a batch
    s_steps: int  # student steps a round


class InitFn(Protocol):
    """Makes the state of round 0.  The key is consumed."""

    def __call__(self, frozen: Frozen, key: Key) -> State: ...


class StepFn(Protocol):
    """Takes one step; with `frozen` bound, the body of a scan.  The key is consumed.

    Returns a state of the same structure, shapes and dtypes, and scalar metrics.
    """

    def __call__(self, frozen: Frozen, state: State, key: Key) -> tuple[State, Metrics]: ...


class SampleFn(Protocol):
    """Draws images that the student would train on at this state.  The key is consumed."""

    def __call__(self, frozen: Frozen, state: State, key: Key) -> Batch: ...


def unchanged(frozen: Frozen, state: State, key: Key) -> tuple[State, Metrics]:
    """The step of a method that does nothing there."""
    del frozen, key
    return state, {}


class Method(NamedTuple):
    """A data-free distillation method: six pure functions over one `State`.

    A batch of synthesis is `begin`, then n `generator_step`s, then `finish`.  Then the student
    takes m `student_step`s.  The phase sets n and m, not the method.

    held_out: as `sample`, images that no student step ever trains on, for a key that no other call
      gets; with a bank, only where `Models.hold_out` is set.  None: those of `sample` are such,
      since it draws them anew.
    warmup_step: in place of `generator_step` before the student's first step, where the loss then
      leaves the student out; None: the same.
    """

    init: InitFn
    generator_step: StepFn  # one synthesis update
    student_step: StepFn  # one distillation update
    sample: SampleFn
    begin: StepFn = unchanged  # start of a batch: new latents, noisy layer or generator
    finish: StepFn = unchanged  # end of a batch: images to the bank, a meta-update
    held_out: SampleFn | None = None  # images to measure on, where there are no real ones
    warmup_step: StepFn | None = None


def start(params: Params, batch_stats: Params, tx: optax.GradientTransformation) -> Net:
    """A network before its first update."""
    return Net(params, batch_stats, tx.init(params))


def update(
    net: Net, grads: Params, tx: optax.GradientTransformation, batch_stats: Params = None
) -> Net:
    """One optimiser update; `batch_stats`, if given, replaces the batch statistics."""
    updates, opt_state = tx.update(grads, net.opt_state, net.params)
    return net.replace(
        params=optax.apply_updates(net.params, updates),
        batch_stats=net.batch_stats if batch_stats is None else batch_stats,
        opt_state=opt_state,
    )


def warmup(phases: Iterable[Phase]) -> list[Phase]:
    """The phases before the student's first step."""
    return list(itertools.takewhile(lambda phase: not phase.s_steps, phases))


def warmup_rounds(phases: Iterable[Phase]) -> int:
    """The number of rounds before the student's first step."""
    return sum(phase.rounds for phase in warmup(phases))


def sgd_by_round(student: Any, phases: Sequence[Phase]) -> optax.GradientTransformation:
    """SGD with momentum; a cosine from `lr` to `final_lr`, constant within a round.

    student, phases: the config's.  Raises ValueError unless there are phases after the warm-up and
    all of them have the same number of student steps.
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
    """The round counter of a new state: 0."""
    return jnp.zeros((), jnp.int32)
