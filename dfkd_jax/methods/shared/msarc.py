"""mSARC: a student that answers as its teacher does, and for the same places of an image.

The student's loss in the code of SpaceshipNet (Yu et al., CVPR 2023), which is named of DiffDFKD
too; any method takes it in place of its own distillation (`config.loss.student='msarc'`).  With
t, s the teacher's and the student's logits, M a network's class activation map (Zhou et al. 2016),
its linear layer without the bias at every position of its last map, and G_l its Grad-CAM (Selvaraju
et al. 2017) at stage l for the class that the teacher predicts:

    L = kd T^2 KL(softmax(t / T) || softmax(s / T)) + cam E[(M_s - M_t)^2]
        + gradcam sum_l E[(G_ls - G_lt)^2],     T = 30

    G_l = sum_k a_lk A_lk,     a_lk = the mean over positions of d logit / d A_lk

The weights are those of `config.msarc`.  E is a mean over images, positions and classes.  As in
that code a Grad-CAM is not rectified, and no gradient passes through a_l or the linear layer: the
student moves its maps.  Stages are compared where both networks have one of that size.  There the
divergence is a mean over classes, so that its weight is `kd` = 1 / classes here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from dfkd_jax import losses
from dfkd_jax.contract import Array, Metrics, Params
from dfkd_jax.distributed.sharding import Shards

Loss = Callable[[Any], tuple[Array, Metrics]]  # of the student's output: the loss, its terms

STUDENTS = ('kd', 'msarc')


class Msarc(NamedTuple):
    """The loss between two networks (linen modules).

    weights: `config.msarc`.
    pairs: of a stage of the teacher and one of the student, by number, of equal size.
    """

    weights: Any
    teacher: Any
    student: Any
    shards: Shards
    pairs: tuple[tuple[int, int], ...]

    def aim(self, teacher: Params, student: Params, image: Array, output: Any) -> Loss:
        """The loss of the student's output on this instance's images [B, H, W, channels].

        teacher, student: their variables, the student's before its step, which it takes in train
            mode.
        output: the teacher's on the images.
        """
        weights = self.weights
        top = jnp.argmax(output.logits, axis=-1)
        classes = output.logits.shape[-1]
        ours: list[Array] = []
        targets: list[Array] = []
        if weights.gradcam:
            of_teacher = self._weights_of_maps(self.teacher, teacher, image, top)
            of_student = self._weights_of_maps(self.student, student, image, top, train=True)
            targets = [gradcam(output.stages[i], of_teacher[i]) for i, _ in self.pairs]
            ours = [of_student[j] for _, j in self.pairs]

        def loss(found: Any) -> tuple[Array, Metrics]:
            terms: Metrics = {}
            if weights.kd:
                kd = losses.kd(found.logits, output.logits, weights.temperature)
                terms['kd'] = jnp.mean(kd)
            if weights.cam:
                maps = (found.last, student['params']), (output.last, teacher['params'])
                terms['cam'] = _distance(*(x @ head(params, classes) for x, params in maps))
            if weights.gradcam:
                cams = [gradcam(found.stages[j], w) for (_, j), w in zip(self.pairs, ours)]
                terms['gradcam'] = sum(map(_distance, cams, targets), jnp.zeros(()))
            return sum((weights[name] * x for name, x in terms.items()), jnp.zeros(())), terms

        return loss

    def _weights_of_maps(
        self, module: Any, variables: Params, image: Array, top: Array, train: bool = False
    ) -> list[Array]:
        """a_l of each stage, [B, 1, 1, C]: what a logit gains where a whole channel does.

        top: [B], whose logit.
        """

        def apply(variables: Params, image: Array) -> tuple[Array, tuple[Array, ...]]:
            if not train:
                out = module.apply(variables, image)
            else:
                out, _ = module.apply(variables, image, train=True, mutable=['batch_stats'])
            return out.logits, out.stages

        run, stages = shifted(apply, variables, image)

        def score(shifts: list[Array]) -> tuple[Array, tuple[()]]:
            logits = run([self.shards.share(x) for x in shifts])
            return jnp.sum(jnp.take_along_axis(logits, top[:, None], axis=-1)), ()

        # Of the whole batch: in train mode an image's statistics reach all others.
        count = self.shards.size * len(image)
        zeros = [jnp.zeros((count, 1, 1, x.shape[-1])) for x in stages]
        _, grads = self.shards.value_and_grad(score)(zeros)
        areas = [x.shape[1] * x.shape[2] for x in stages]
        return [self.shards.share(self.shards.size * x / n) for x, n in zip(grads, areas)]


def make(config: Any, teacher: Any, student: Any, shape: tuple, shards: Shards) -> Msarc | None:
    """The loss between these modules, if `config.loss.student` asks for it; else None.

    shape: (H, W, channels) of an image.  Raises ValueError for an unknown choice, and for networks
    without maps to compare.
    """
    if config.loss.student not in STUDENTS:
        raise ValueError(
            f'config.loss.student={config.loss.student!r}; expected one of {STUDENTS}.'
        )
    if config.loss.student == 'kd':
        return None
    blank = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    outputs = []
    for name, module in (('teacher', teacher), ('student', student)):
        whole = module.clone(axis_name=None)
        out = jax.eval_shape(lambda x, m=whole: m.apply(m.init(jax.random.key(0), x), x), blank)
        if out.last is None or not out.stages:
            raise ValueError(
                f"config.loss.student='msarc' compares where networks look, and the {name} does "
                'not classify the mean of its last map by one linear layer: choose another '
                "(ResNets, wide ResNets and VGGs do), or set config.loss.student='kd'."
            )
        outputs.append(out)
    of_teacher, of_student = ([x.shape[1:3] for x in out.stages] for out in outputs)
    pairs = tuple((of_teacher.index(x), j) for j, x in enumerate(of_student) if x in of_teacher)
    ends = [out.last.shape[1:3] for out in outputs]
    if not pairs or ends[0] != ends[1]:
        raise ValueError(
            f"config.loss.student='msarc': the teacher's maps are {of_teacher}, its last one "
            f"{ends[0]}, and the student's {of_student}, its last one {ends[1]}: choose networks "
            "whose last maps are of one size, or set config.loss.student='kd'."
        )
    return Msarc(config.msarc, teacher, student, shards, pairs)


def head(params: Params, classes: int) -> Array:
    """The weights [F, C] of the linear layer of C classes at the top of a classifier's params.

    No gradient passes.
    """
    layers = [x for x in params.values() if 'kernel' in x and x['kernel'].ndim == 2]
    (kernel,) = (x['kernel'] for x in layers if x['kernel'].shape[-1] == classes)
    return jax.lax.stop_gradient(kernel)


def gradcam(x: Array, weights: Array) -> Array:
    """The Grad-CAM [B, h, w] of maps [B, h, w, C], whose channels weigh [B, 1, 1, C]."""
    return jnp.sum(x.astype(jnp.float32) * weights, axis=-1)


def _distance(a: Array, b: Array) -> Array:
    return jnp.mean(jnp.square(a.astype(jnp.float32) - b.astype(jnp.float32)))


def shifted(fn: Callable, *inputs: Any) -> tuple[Callable, tuple[Any, ...]]:
    """``fn(*inputs) -> (out, maps)`` as a function of what is added to its maps inside it.

    Returns ``[shift of each map] -> out``, and the shapes of the maps.  It is how the gradient with
    respect to a network's maps is taken of any network: its program is run again, step by step, and
    a map is shifted where it is made.
    """
    traced, shapes = jax.make_jaxpr(fn, return_shape=True)(*inputs)
    program = traced.jaxpr
    places = *program.constvars, *program.invars
    given = dict(zip(places, [*traced.consts, *jax.tree.leaves(inputs)]))

    def run(shifts: list[Array]) -> Array:
        values, of_map = dict(given), dict(zip(program.outvars[1:], shifts))

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, core.Literal) else values[atom]

        for step in program.eqns:
            params = step.primitive.get_bind_params(step.params)
            results = step.primitive.bind(*map(read, step.invars), **params)
            if not step.primitive.multiple_results:
                results = [results]
            for place, result in zip(step.outvars, results):
                shift = of_map.get(place)
                values[place] = result if shift is None else result + shift.astype(result.dtype)
        return read(program.outvars[0])

    return run, shapes[1]
