"""mSARC, the loss of a student that looks where its teacher looks: by hand, and in every method."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.test_util import check_grads

from dfkd_jax import build, losses, models
from dfkd_jax.configs import digits
from dfkd_jax.distributed.sharding import Shards
from dfkd_jax.errors import ConfigError
from dfkd_jax.loops import supervised
from dfkd_jax.methods import METHODS
from dfkd_jax.methods.shared import msarc

pytestmark = pytest.mark.usefixtures('fast_compilation')
IMAGE = np.random.default_rng(0).normal(size=(8, tiny.SIZE, tiny.SIZE, 3)).astype(np.float32)


WHOLE = Shards()


def loss_of(shards: Shards = WHOLE, **weights: float) -> msarc.Msarc:
    config = tiny.config('nayer', loss__student='msarc')
    config.msarc.update(weights)
    nets = tiny.nets(config, shards.axis, smooth=True, student_width=4)
    found = msarc.make(config, nets.teacher, nets.student, nets.image_shape, shards)
    assert found is not None
    return found


def pair() -> tuple[Any, Any]:
    """The variables of a teacher and of a narrower student."""
    student = tiny.Classifier(4, smooth=True)
    return tiny.frozen(smooth=True).teacher, student.init(jax.random.key(3), IMAGE)


def in_train_mode(loss: msarc.Msarc, variables: Any, image: jax.Array) -> Any:
    return loss.student.apply(variables, image, train=True, mutable=['batch_stats'])[0]


def tail(params: Any, running: Any, first: jax.Array, second: Any = None) -> Any:
    """The tiny classifier from its first map on: logits and last map.

    running: None in train mode, where a batch norm uses the moments of the batch.
    second: what is added to the last map.
    """
    kernel, norm = params['conv2']['kernel'], params['bn2']
    x = jax.lax.conv_general_dilated(
        first, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )
    mean, var = jnp.mean(x, (0, 1, 2)), jnp.var(x, (0, 1, 2))
    if running is not None:
        mean, var = running['bn2']['mean'], running['bn2']['var']
    mean, var, scale, bias = (v[None, None, None] for v in (mean, var, norm['scale'], norm['bias']))
    x = jnp.tanh((x - mean) / jnp.sqrt(var + 1e-5) * scale + bias)
    x = x if second is None else x + second
    return jnp.mean(x, (1, 2)) @ params['fc']['kernel'] + params['fc']['bias'][None], x


def by_hand(variables: Any, out: Any, top: jax.Array, train: bool) -> tuple[list, jax.Array]:
    """A network's Grad-CAMs of its two stages, and its class activation maps."""
    params, running = variables['params'], None if train else variables['batch_stats']

    def score(first: jax.Array, second: jax.Array) -> jax.Array:
        return jnp.sum(tail(params, running, first, second)[0][jnp.arange(len(top)), top])

    grads = jax.grad(score, (0, 1))(out.stages[0], jnp.zeros_like(out.stages[1]))
    cams = [
        np.einsum('bhwc,bc->bhw', x, np.mean(g, (1, 2)))
        for x, g in zip(out.stages, grads, strict=True)
    ]
    return cams, np.einsum('bhwf,fc->bhwc', out.stages[1], params['fc']['kernel'])


def test_values_by_hand():
    teacher, student = pair()
    loss = loss_of(kd=0.5, cam=2.0, gradcam=3.0, temperature=7.0)
    of_teacher = loss.teacher.apply(teacher, IMAGE)
    of_student = in_train_mode(loss, student, IMAGE)
    total, terms = loss.aim(teacher, student, IMAGE, of_teacher)(of_student)

    top = jnp.argmax(of_teacher.logits, -1)
    cams, maps = by_hand(teacher, of_teacher, top, train=False)
    own_cams, own_maps = by_hand(student, of_student, top, train=True)
    expected = {
        'kd': np.mean(losses.kd(of_student.logits, of_teacher.logits, 7.0)),
        'cam': np.mean((own_maps - maps) ** 2),
        'gradcam': sum(np.mean((a - b) ** 2) for a, b in zip(own_cams, cams, strict=True)),
    }
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(terms[name], value, rtol=1e-4, err_msg=name)
    weighted = 0.5 * expected['kd'] + 2 * expected['cam'] + 3 * expected['gradcam']
    np.testing.assert_allclose(total, weighted, rtol=1e-4)


def test_the_class_activation_map_has_the_logits_as_its_mean():
    teacher, _ = pair()
    out = loss_of().teacher.apply(teacher, IMAGE)
    maps = out.last @ msarc.head(teacher['params'], tiny.CLASSES)
    logits = jnp.mean(maps, (1, 2)) + teacher['params']['fc']['bias'][None]
    np.testing.assert_allclose(logits, out.logits, rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_the_maps_alone():
    """What weighs the channels, and the linear layer in the maps of classes, are constants."""
    teacher, student = pair()
    loss = loss_of(kd=0.0)
    aim = loss.aim(teacher, student, IMAGE, loss.teacher.apply(teacher, IMAGE))

    def total(params: Any) -> jax.Array:
        return aim(in_train_mode(loss, student | {'params': params}, IMAGE))[0]

    check_grads(total, (student['params'],), order=1, modes='rev', atol=1e-2, rtol=1e-2, eps=1e-3)
    grads = jax.jit(jax.grad(total))(student['params'])
    assert not np.any(tiny.vector(grads['fc']))
    assert np.all([np.any(x) for x in jax.tree.leaves(grads['conv1'])])


def test_a_student_that_equals_its_teacher_loses_nothing_in_evaluation():
    teacher, _ = pair()
    loss = loss_of()
    out = loss.teacher.apply(teacher, IMAGE)
    top = jnp.argmax(out.logits, -1)
    cams, _ = by_hand(teacher, out, top, train=False)
    weights = loss._weights_of_maps(loss.teacher, teacher, IMAGE, top)
    for x, w, cam in zip(out.stages, weights, cams, strict=True):
        np.testing.assert_allclose(msarc.gradcam(x, w), cam, rtol=1e-3, atol=1e-6)
    twin = loss._replace(student=loss.teacher)
    total, _ = twin.aim(teacher, teacher, IMAGE, out)(out)
    in_train, _ = twin.aim(teacher, teacher, IMAGE, out)(in_train_mode(twin, teacher, IMAGE))
    assert total < 0.1 * in_train


@pytest.mark.parametrize('name', ['kd', 'cam', 'gradcam'])
def test_a_weight_of_zero_removes_its_term(name: str):
    """And what it costs: without Grad-CAMs there is one pass through the teacher, given."""
    teacher, student = pair()
    loss = loss_of(**{name: 0.0})

    def run(teacher: Any, student: Any) -> Any:
        out = jax.tree.map(jnp.asarray, given)
        return loss.aim(teacher, student, IMAGE, out)(in_train_mode(loss, student, IMAGE))[1]

    given = loss.teacher.apply(teacher, IMAGE)
    program = jax.make_jaxpr(run)(teacher, student)
    assert set(jax.eval_shape(run, teacher, student)) == {'kd', 'cam', 'gradcam'} - {name}
    convolutions = str(program).count('conv_general_dilated[')
    assert (convolutions == 2) == (name == 'gradcam')


def test_shares_of_a_batch_have_the_whole_batchs_loss():
    """In train mode an image's map reaches every logit of the batch, on whichever device."""
    teacher, student = pair()
    ends = []
    for shards in (Shards(), Shards('data', 4)):
        loss = loss_of(shards)

        def step(image: jax.Array, loss: Any = loss, shards: Any = shards) -> Any:
            out = loss.teacher.apply(teacher, image)
            aim = loss.aim(teacher, student, image, out)

            def total(params: Any) -> Any:
                return aim(in_train_mode(loss, student | {'params': params}, image))

            (value, terms), grads = shards.value_and_grad(total)(student['params'])
            return shards.mean((value, terms, grads))

        if shards.axis:
            mapped = jax.vmap(step, axis_name='data', axis_size=4)
            found = jax.jit(mapped)(IMAGE.reshape(4, 2, *IMAGE.shape[1:]))
            ends.append(jax.tree.map(lambda x: x[0], found))
        else:
            ends.append(jax.jit(step)(IMAGE))
    tiny.close(ends[1], ends[0], 1e-4)


@pytest.mark.parametrize(
    'name', tiny.quick(['resnet8', 'wrn16_1', 'vgg8', 'mobilenetv2_cifar'], 'resnet8', 'vgg8')
)
def test_networks_of_the_zoo(name: str):
    """The last map is the one that is averaged, and the linear layer is found."""
    module = models.make(name)
    image = jnp.zeros((1, 16, 16, 3))
    out, variables = jax.eval_shape(lambda x: module.init_with_output(jax.random.key(0), x), image)
    assert out.last.shape[-1] == out.features.shape[-1]
    kernel = jax.eval_shape(lambda p: msarc.head(p, 10), variables['params'])
    assert kernel.shape == (out.features.shape[-1], 10)
    config = tiny.config('nayer', loss__student='msarc')
    assert msarc.make(config, module, module, (16, 16, 3), Shards()).pairs[0] == (0, 0)


def steps_of(name: str, **changes: Any) -> dict[str, Any]:
    """What a student step of a method would report, traced and not computed."""
    method = tiny.method(tiny.config(name, **changes), Shards())
    frozen, key = jax.eval_shape(lambda: tiny.frozen(method=name)), jax.random.key(0)
    state = jax.eval_shape(method.init, frozen, key)
    return jax.eval_shape(method.student_step, frozen, state, key)[1]


@pytest.mark.parametrize(
    'name', tiny.quick([n for n in METHODS if n != 'diffdfkd'], 'cpsc', 'nayer', 'zskt', 'noise')
)
def test_every_method_takes_it(name: str):
    found = steps_of(name, loss__student='msarc')
    assert {'s/kd', 's/cam', 's/gradcam', 's/agreement'} <= found.keys()
    plain = steps_of(name, loss__student='kd')
    assert plain.keys() == found.keys() - {'s/cam', 's/gradcam'}


def test_diffdfkds_student_takes_it():
    """It is trained as on real images, in `distil`."""
    config = digits.get_config('diffdfkd')
    config.parallel, config.distil.batch_size = 'jit', 16
    teacher = build.make_classifier('resnet8', config.data, config.dtype)
    image = jnp.zeros((16, 16, 16, 1))
    variables = jax.eval_shape(lambda: teacher.init(jax.random.key(0), image))

    def work(student: str) -> int:
        config.loss.student = student
        training = supervised.prepare(config, 'distil', 'resnet8_half', 1, distil=True)
        net = jax.eval_shape(lambda: supervised._first_state(training, jax.random.key(0), None))
        inputs = (image.astype(jnp.uint8), jnp.zeros(16, jnp.int32)), jax.random.key(0)
        program = jax.make_jaxpr(training.step)(variables, net, inputs)
        return str(program).count('conv_general_dilated[')

    assert work('msarc') > work('kd')


REFUSED = {
    'a choice': (dict(loss='look'), {}, "loss.student='look'; expected one of"),
    'no maps': ({}, dict(teacher='lenet5', size=32), 'the teacher does not classify the mean'),
    'no linear layer over a mean': (
        {},
        dict(student='vit_tiny_cifar', size=32),
        'the student does',
    ),
    'sizes': ({}, dict(student='vgg8', size=32), 'whose last maps are of one size'),
}


@pytest.mark.parametrize('case', REFUSED)
def test_what_cannot_be_compared_is_refused_before_anything_is_compiled(case: str):
    loss, nets, match = REFUSED[case]
    config = digits.get_config('noise')
    config.parallel = 'jit'
    config.data.update(image_size=nets.get('size', 16), channels=1)
    config.teacher.model = nets.get('teacher', 'resnet18')
    config.student.model = nets.get('student', 'resnet18')
    if case == 'sizes':
        config.teacher.model = 'resnet18_imagenet'
    config.loss.student = loss.get('loss', 'msarc')
    with pytest.raises(ConfigError, match=match) as error:
        build.build(config)
    assert '\n' not in str(error.value)


def test_it_is_a_field_of_every_method():
    for name in METHODS:
        config = digits.get_config(name)
        assert config.loss.student in msarc.STUDENTS
        assert config.msarc.temperature == 30 and config.msarc.cam == config.msarc.gradcam == 1
    assert 'loss' not in digits.get_config('kd')
