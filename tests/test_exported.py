"""Networks from `.pt2` and `.onnx` files equal PyTorch's, teach, and what is wrong is told."""

from __future__ import annotations

import copy
import json
import shutil
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from reference import float64

torch = pytest.importorskip('torch', reason='PyTorch computes the reference')
onnx = pytest.importorskip('onnx')

import exporting  # noqa: E402
from torch import nn  # noqa: E402

from dfkd_jax import build, loops, losses, port  # noqa: E402
from dfkd_jax.configs import common, digits  # noqa: E402
from dfkd_jax.errors import ConfigError, PortError, UserError  # noqa: E402
from dfkd_jax.loops import session  # noqa: E402

ENDINGS = ('.pt2', '.onnx')


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp('exported')


@pytest.fixture(scope='module')
def exported(folder: Path) -> Callable[[str, str], Path]:
    """The file of a network of `exporting`, made once."""
    program = cache(lambda name: exporting.program(exporting.network(name)))
    return cache(lambda name, ending: exporting.save(program(name), folder / f'{name}{ending}'))


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What the library warned of; PyTorch logs too."""
    return lambda: [each.getMessage() for each in caplog.records if each.name == 'root']


# 1. Against PyTorch


def images(batch: int = 3, size: int = exporting.SIZE) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(batch, size, size, 3)).astype(np.float32)


def weights(shape: tuple[int, ...]) -> np.ndarray:
    """What logits are multiplied by, to be one number with a gradient."""
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def by_torch(network: Any, x: np.ndarray, kind: Any) -> tuple[Any, ...]:
    """Logits, the moments of every batch norm's input, features and the gradient of the images.

    The gradient is that of a weighted sum of logits and of the squares of all moments.
    """
    network = copy.deepcopy(network).to(kind)
    batch = torch.tensor(x.transpose(0, 3, 1, 2), dtype=kind, requires_grad=True)
    moments, features = {}, []
    for name, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d):

            def keep(module: Any, inputs: Any, name: str = name) -> None:
                mean, var = inputs[0].mean((0, 2, 3)), inputs[0].var((0, 2, 3), unbiased=False)
                moments[name] = {'mean': mean, 'var': var}

            module.register_forward_pre_hook(keep)
        elif isinstance(module, nn.Linear) and name in ('head', 'other'):
            module.register_forward_pre_hook(lambda module, inputs: features.append(inputs[0]))
    logits = network(batch)
    total = (logits * torch.tensor(weights(tuple(logits.shape)), dtype=kind)).sum()
    total = total + sum((each**2).sum() for pair in moments.values() for each in pair.values())
    (gradient,) = torch.autograd.grad(total, batch)
    return jax.tree.map(
        lambda t: t.detach().numpy(),
        (logits, moments, torch.cat(features, -1) if features else None,
         gradient.permute(0, 2, 3, 1)),
    )  # fmt: skip


def by_us(path: Path, x: np.ndarray, kind: Any) -> tuple[Any, ...]:
    """The same of the network in a file."""
    module, variables = port.load_exported(path)
    module = module.clone(dtype=kind)
    variables = jax.tree.map(lambda v: jnp.asarray(v, kind), variables)
    row = jnp.asarray(weights((len(x), module.num_classes)), kind)

    def total(x: Any) -> Any:
        out = module.apply(variables, x)
        squares = [jnp.sum(jnp.square(each)) for each in jax.tree.leaves(out.statistics)]
        return jnp.sum(out.logits * row) + sum(squares), out

    (_, out), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(jnp.asarray(x, kind))
    return out.logits, out.statistics, out.features, gradient


def close(found: Any, expected: Any, tolerance: float) -> None:
    """Each array, relative to its largest number."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        assert a.shape == b.shape
        assert np.abs(np.asarray(a) - b).max() <= tolerance * np.abs(b).max()


# In every run of the tests; the others are slow.
QUICK = {
    '.pt2': ('dilated', 'densenet', 'vit', 'mixed'),
    '.onnx': ('mobilenet', 'squeezenet'),
}


def both() -> list[Any]:
    """All networks from both kinds of files; most are slow tests."""
    return [
        pytest.param(
            name, ending,
            marks=() if name in QUICK[ending] else pytest.mark.slow,
        )
        for name in exporting.NETWORKS
        for ending in ENDINGS
    ]  # fmt: skip


def compare(
    network: Any, path: Path, x: np.ndarray, kind: str, tolerance: float, of_moments: float
) -> None:
    """of_moments: their tolerance; a variance is a small difference of two means."""
    logits, moments, features, gradient = by_us(path, x, jnp.dtype(kind))
    expected = by_torch(network, x, getattr(torch, kind))
    assert logits.dtype == kind
    close(logits, expected[0], tolerance)
    close(moments, expected[1], of_moments)
    if expected[2] is not None:
        close(features, expected[2], tolerance)
    assert np.abs(gradient - expected[3]).max() <= 10 * tolerance * np.abs(expected[3]).max()


@pytest.mark.parametrize(('name', 'ending'), both())
def test_equals_pytorch_in_float64(name: str, ending: str, exported: Any) -> None:
    """To 1e-9, gradients too; an ONNX file has epsilons in float32, which is worth 1e-12."""
    path = exported(name, ending)
    with float64():
        jax.config.update('jax_disable_most_optimizations', True)  # it compiles for seconds
        compare(exporting.network(name), path, images(), 'float64', 1e-10, 1e-10)


@pytest.mark.parametrize(
    ('name', 'ending'),
    [
        *[('regnet', ending) for ending in ENDINGS],
        ('swin', '.pt2'),
        *[pytest.param(name, '.pt2', marks=pytest.mark.slow)
          for name in exporting.NETWORKS if name not in ('regnet', 'swin')],
    ],
)  # fmt: skip
def test_equals_pytorch_in_float32(
    name: str, ending: str, exported: Any, fast_compilation: None
) -> None:
    """Logits to 2e-6 of the largest, gradients to 2e-5, statistics to 1e-4."""
    compare(exporting.network(name), exported(name, ending), images(), 'float32', 2e-6, 1e-4)


TORCHVISION = {
    'regnet_y_400mf': {}, 'mobilenet_v3_small': {}, 'shufflenet_v2_x0_5': {}, 'densenet121': {},
    'resnext50_32x4d': {}, 'convnext_tiny': {}, 'swin_t': {}, 'efficientnet_b0': {},
    'vit_b_16': {'image_size': 64},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize('name', TORCHVISION)
def test_torchvisions_networks_equal_pytorch(name: str, folder: Path, ending: str = '.pt2') -> None:
    """Float64 to 1e-9 at 64 pixels."""
    models = pytest.importorskip('torchvision_models').load()
    torch.manual_seed(0)
    network = getattr(models, name)(weights=None, num_classes=7, **TORCHVISION[name])
    path = exporting.save(exporting.program(exporting.norm(network), 64), folder / f'{name}.pt2')
    with float64():
        jax.config.update('jax_disable_most_optimizations', True)
        compare(network, path, images(2, 64), 'float64', 1e-10, 1e-10)


# 2. What a network offers


def run(module: Any, variables: Any, x: Any) -> Any:
    return jax.jit(module.apply)(variables, x)


def test_any_batch_size(exported: Any, fast_compilation: None) -> None:
    module, variables = port.load_exported(exported('vit', '.pt2'))
    x = images(4)
    whole = run(module, variables, x).logits
    alone = run(module, variables, x[:1]).logits
    np.testing.assert_allclose(alone, whole[:1], atol=1e-5)


@pytest.mark.parametrize('ending', ENDINGS)
def test_shapes_and_places(ending: str, exported: Any) -> None:
    module, variables = port.load_exported(exported('densenet', ending))
    out = jax.eval_shape(module.apply, variables, jax.ShapeDtypeStruct((3, 12, 12, 3), jnp.float32))
    assert (module.num_classes, module.image_shape) == (exporting.CLASSES, (12, 12, 3))
    names = {name for name, each in exporting.network('densenet').named_modules()
             if isinstance(each, nn.BatchNorm2d)}  # fmt: skip
    assert variables['batch_stats'].keys() == names
    assert jax.tree.structure(out.statistics) == jax.tree.structure(variables['batch_stats'])
    assert [x.shape[1:3] for x in out.stages] == [(12, 12), (6, 6), (3, 3)]
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(variables))
    assert hash(module) == hash(port.load_exported(exported('densenet', ending))[0])
    assert module != module.clone(axis_name='batch')


def test_features_of_a_convolutional_head_are_means(exported: Any, fast_compilation: None) -> None:
    module, variables = port.load_exported(exported('squeezenet', '.onnx'))
    out = run(module, variables, images())
    net = exporting.network('squeezenet')
    with torch.no_grad():
        expected = net.body(torch.tensor(images().transpose(0, 3, 1, 2))).mean((2, 3)).numpy()
    np.testing.assert_allclose(out.features, expected, atol=1e-5)


@pytest.mark.parametrize('name', ['mobilenet', 'swin'])
def test_bfloat16(name: str, exported: Any, fast_compilation: None) -> None:
    """Activations alone: outputs and statistics stay float32, and are near those of float32."""
    module, variables = port.load_exported(exported(name, '.pt2'))
    half = jax.jit(module.clone(dtype=jnp.bfloat16).apply)(variables, images())
    whole = jax.jit(module.apply)(variables, images())
    assert {x.dtype for x in jax.tree.leaves(half._replace(stages=()))} == {np.dtype('float32')}
    assert {x.dtype for x in half.stages} <= {jnp.dtype('bfloat16')}
    close(half._replace(stages=()), jax.device_get(whole._replace(stages=())), 0.05)


def test_statistics_over_shards(exported: Any, fast_compilation: None) -> None:
    """With `axis_name` they are those of the whole batch."""
    module, variables = port.load_exported(exported('regnet', '.onnx'))
    x = jnp.asarray(images(4))
    whole = jax.jit(module.apply)(variables, x)
    apply = jax.vmap(module.clone(axis_name='batch').apply, (None, 0), axis_name='batch')
    sharded = jax.jit(apply)(variables, x.reshape(2, 2, *x.shape[1:]))
    parts = jax.tree.map(lambda v: v[0], sharded.statistics)
    close(parts, jax.device_get(whole.statistics), 1e-4)
    np.testing.assert_allclose(sharded.logits.reshape(4, -1), whole.logits, atol=1e-5)


def test_running_statistics_are_at_no_distance_from_themselves(exported: Any) -> None:
    module, variables = port.load_exported(exported('regnet', '.pt2'))
    running = variables['batch_stats']
    assert losses.bn_statistics(jax.tree.map(jnp.asarray, running), running) < 1e-9
    assert module.init(jax.random.key(0), jnp.zeros((1, 12, 12, 3))).keys() == variables.keys()
    with pytest.raises(ValueError, match='cannot train'):
        module.apply(variables, images(), train=True)


class Body(nn.Module):
    """One convolution, and whatever follows it."""

    def __init__(self, end: Callable[[Any, Any], Any], track: bool = True):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=track)
        self.head, self.end = nn.Linear(4, exporting.CLASSES), end

    def forward(self, x: Any) -> Any:
        y = self.norm(self.conv(x)).relu().mean((2, 3))
        return self.end(self.head(y), y)


def made(path: Path, end: Any = lambda y, _: y, train: bool = False, track: bool = True) -> Path:
    torch.manual_seed(0)
    network = Body(end, track).train(train)
    return exporting.save(exporting.program(network), path)


@pytest.mark.parametrize('ending', tiny.quick(ENDINGS, '.pt2'))
def test_a_softmax_at_the_end_is_left_out(
    ending: str, tmp_path: Path, plain: Any, said: Any, fast_compilation: None
) -> None:
    path = made(tmp_path / f'net{ending}', lambda y, _: y.softmax(-1))
    module, variables = port.load_exported(path)
    assert said() == [f'{path} ends in a softmax: its logits are what goes into it.']
    without, _ = port.load_exported(plain(ending))
    x = images()
    np.testing.assert_array_equal(
        run(module, variables, x).logits, run(without, variables, x).logits
    )


def test_an_image_may_be_of_any_size_where_the_file_says_so(tmp_path: Path) -> None:
    network = Body(lambda y, _: y).eval()
    dims = {axis: torch.export.Dim(f'd{axis}', min=8 if axis else 1, max=64) for axis in (0, 2, 3)}
    program = torch.export.export(network, (torch.zeros(2, 3, 12, 14),), dynamic_shapes=(dims,))
    module, variables = port.load_exported(exporting.save(program, tmp_path / 'net.pt2'))
    assert module.image_shape == (None, None, 3) and module.num_classes is None
    x = jax.ShapeDtypeStruct((2, 9, 11, 3), jnp.float32)
    assert jax.eval_shape(module.apply, variables, x).logits.shape == (2, exporting.CLASSES)


def test_tensorflows_layout(tmp_path: Path) -> None:
    """Channels last, transposed inside, a dense layer and a softmax, as tf2onnx writes Keras."""
    helper, rng = onnx.helper, np.random.default_rng(0)
    kernel, dense = (rng.normal(size=s).astype(np.float32) for s in ((4, 3, 3, 3), (4, 5)))
    nodes = [
        helper.make_node('Transpose', ['x'], ['t'], perm=[0, 3, 1, 2]),
        helper.make_node('Conv', ['t', 'kernel'], ['c'], auto_pad='SAME_UPPER', strides=[2, 2]),
        helper.make_node('Relu', ['c'], ['r']),
        helper.make_node('ReduceMean', ['r'], ['m'], axes=[2, 3], keepdims=0),
        helper.make_node('MatMul', ['m', 'dense'], ['d']),
        helper.make_node('Softmax', ['d'], ['p']),
    ]
    graph = helper.make_graph(
        nodes, 'keras',
        [helper.make_tensor_value_info('x', 1, ['n', 9, 8, 3])],
        [helper.make_tensor_value_info('p', 1, ['n', 5])],
        [onnx.numpy_helper.from_array(kernel, 'kernel'),
         onnx.numpy_helper.from_array(dense, 'dense')],
    )  # fmt: skip
    path = tmp_path / 'keras.onnx'
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid('', 13)]), path)
    module, variables = port.load_exported(path)
    assert module.image_shape == (9, 8, 3)
    x = rng.normal(size=(2, 9, 8, 3)).astype(np.float32)
    padded = np.pad(x, ((0, 0), (1, 1), (0, 1), (0, 0))).transpose(0, 3, 1, 2)
    maps = torch.conv2d(torch.tensor(padded), torch.tensor(kernel), stride=2).relu()
    out = run(module, variables, x)
    np.testing.assert_allclose(out.features, maps.mean((2, 3)).numpy(), atol=1e-5)
    np.testing.assert_allclose(out.logits, maps.mean((2, 3)).numpy() @ dense, atol=1e-5)


def test_a_batch_norm_that_is_called_twice_has_two_statistics(tmp_path: Path) -> None:
    class Twice(Body):
        def forward(self, x: Any) -> Any:
            y = self.norm(self.conv(x))
            return self.head(self.norm(2 * y.relu()).mean((2, 3)))

    network = exporting.norm(Twice(None))
    path = exporting.save(exporting.program(network), tmp_path / 'net.pt2')
    module, variables = port.load_exported(path)
    out = run(module, variables, images())
    assert variables['batch_stats'].keys() == out.statistics.keys() == {'norm', 'norm#2'}
    with torch.no_grad():
        y = network.conv(torch.tensor(images().transpose(0, 3, 1, 2)))
        second = 2 * network.norm(y).relu()
    for key, x in (('norm', y), ('norm#2', second)):
        np.testing.assert_allclose(out.statistics[key]['mean'], x.mean((0, 2, 3)), atol=1e-5)


# 3. What is refused, and what is said


def refused(path: Path, *words: str) -> str:
    """The message, a line, of the error that loading raises; it has all the words."""
    with pytest.raises(PortError) as error:
        port.load_exported(path)
    text = str(error.value)
    assert str(path) in text and '\n' not in text, text
    assert all(word in text for word in words), text
    return text


class Sorted(Body):
    def forward(self, x: Any) -> Any:
        y = self.norm(self.conv(x)).sort(1).values.mean((2, 3))
        return self.head(torch.fft.fft(y).real + y.cumprod(1))


def test_unknown_operators_are_listed_at_once(tmp_path: Path) -> None:
    path = exporting.save(exporting.program(Sorted(None).eval()), tmp_path / 'net.pt2')
    refused(path, 'has 4 operators that are not read', 'aten.sort.default', 'aten.fft_fft',
            'aten.cumprod')  # fmt: skip


def test_a_pt2_without_decompositions(tmp_path: Path) -> None:
    path = tmp_path / 'net.pt2'
    torch.export.save(exporting.program(Body(lambda y, _: y).eval()), path)
    refused(path, 'was saved without .run_decompositions({})', 'torch.export.export(')


def test_training_mode(tmp_path: Path, model: Any) -> None:
    refused(made(tmp_path / 'net.pt2', train=True), 'model.eval()')
    norm = next(node for node in model.graph.node if node.op_type == 'BatchNormalization')
    norm.attribute.append(onnx.helper.make_attribute('training_mode', 1))
    onnx.save(model, tmp_path / 'net.onnx')
    refused(tmp_path / 'net.onnx', 'training_mode=1', 'model.eval()', norm.name)


def test_a_norm_without_running_statistics(tmp_path: Path) -> None:
    refused(made(tmp_path / 'net.pt2', track=False), "each batch's own moments", 'at norm')


def test_a_fixed_batch_size(change: Any, model: Any, tmp_path: Path) -> None:
    def fixed(content: Any) -> None:
        graph = graph_of(content)
        values = graph['tensor_values']
        image = content['graph_module']['signature']['input_specs'][-1]['user_input']['arg']
        values[image['as_tensor']['name']]['sizes'][0] = {'as_int': 2}

    refused(change(models__model=fixed), 'is for batches of 2 images alone', 'dynamic_shapes')
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(model, tmp_path / 'net.onnx')
    refused(tmp_path / 'net.onnx', 'is for batches of 2 images alone', 'dynamic_shapes')


def followed(content: Any, target: str, **arguments: Any) -> None:
    """Puts an operator between the logits and the result."""
    spec = content['graph_module']['signature']['output_specs'][0]['user_output']['arg']
    logits = {'as_tensor': dict(spec['as_tensor'])}
    graph_of(content)['nodes'].append({
        'target': f'torch.ops.{target}', 'outputs': [{'as_tensor': {'name': 'end'}}], 'name': 'end',
        'inputs': [{'name': 'self', 'arg': logits},
                   *({'name': name, 'arg': arg} for name, arg in arguments.items())],
        'metadata': {},
    })  # fmt: skip
    spec['as_tensor']['name'] = 'end'


def test_control_flow_is_named(change: Any) -> None:
    path = change(models__model=lambda content: followed(content, 'higher_order.cond'))
    refused(path, 'has 1 operators that are not read: higher_order.cond at end')


def test_parameters_that_are_not_read(change: Any) -> None:
    def of_the_future(content: Any) -> None:
        followed(content, 'aten.relu.default', wonder={'as_int': 3})

    refused(change(models__model=of_the_future), 'aten.relu.default at end', "'wonder'")


def test_an_end_that_is_no_logits(change: Any, model: Any, tmp_path: Path) -> None:
    path = change(models__model=lambda content: followed(content, 'aten.sigmoid.default'))
    refused(path, 'ends in aten.sigmoid: expected logits')
    model.graph.node.append(onnx.helper.make_node('Sigmoid', [model.graph.output[0].name], ['end']))
    model.graph.output[0].name = 'end'
    onnx.save(model, tmp_path / 'net.onnx')
    refused(tmp_path / 'net.onnx', 'ends in Sigmoid: expected logits')


def test_two_outputs(change: Any, model: Any, tmp_path: Path) -> None:
    def two(content: Any) -> None:
        specs = content['graph_module']['signature']['output_specs']
        specs.append(specs[0])

    words = 'it has as outputs', 'forward takes images and returns logits'
    refused(change(models__model=two), *words)
    model.graph.output.append(model.graph.output[0])
    onnx.save(model, tmp_path / 'net.onnx')
    refused(tmp_path / 'net.onnx', *words)


def test_maps_in_place_of_logits(model: Any, tmp_path: Path) -> None:
    model.graph.output[0].name = next(n for n in model.graph.node if n.op_type == 'Conv').output[0]
    onnx.save(model, tmp_path / 'net.onnx')
    refused(tmp_path / 'net.onnx', 'returns [3, 4, 10, 10] for 3 images', '[B, num_classes]')


def test_folded_batch_norms_are_told(
    exported: Any, tmp_path: Path, said: Any, fast_compilation: None
) -> None:
    port.load_exported(exported('regnet', '.onnx'))
    assert said() == []
    network, path = exporting.network('regnet'), tmp_path / 'folded.onnx'
    exporting.save(exporting.program(network), path, optimize=True)
    module, variables = port.load_exported(path)
    assert variables['batch_stats'] == {}
    (message,) = said()
    assert message.startswith(f'{path} has no batch norms') and 'optimize=False' in message
    assert '\n' not in message
    x = images()
    expected = network(torch.tensor(x.transpose(0, 3, 1, 2))).detach()
    np.testing.assert_allclose(run(module, variables, x).logits, expected, atol=1e-4)


def test_pytorchs_older_exporter(tmp_path: Path, said: Any, fast_compilation: None) -> None:
    """It keeps batch norms where it is told to."""
    network, path = exporting.network('regnet'), tmp_path / 'net.onnx'
    batch = {'input_names': ['x'], 'dynamic_axes': {'x': {0: 'batch'}}}
    keep = {'training': torch.onnx.TrainingMode.EVAL, 'do_constant_folding': False}
    with exporting.quiet():
        x = torch.zeros(2, 3, exporting.SIZE, exporting.SIZE)
        torch.onnx.export(network, (x,), path, dynamo=False, **batch, **keep)
    compare(network, path, images(), 'float32', 2e-6, 1e-4)
    assert said() == []


def test_networks_without_batch_norms_are_not_suspected(exported: Any, said: Any) -> None:
    for name in ('vit', 'convnext', 'swin', 'big_transfer'):
        assert port.load_exported(exported(name, '.pt2'))[1]['batch_stats'] == {}
    assert said() == []


# 4. Hostile and damaged files


def rewritten(path: Path, to: Path, changes: dict[str, Any] | None = None, **settings: Any) -> Path:
    """A copy of a `.pt2`; changes: a member's new bytes, or a function of its JSON."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(to, 'w', **settings) as target:
        for member in source.infolist():
            data = source.read(member)
            for name, change in (changes or {}).items():
                if member.filename.endswith(name):
                    if callable(change):
                        content = json.loads(data)
                        change(content)
                        data = json.dumps(content).encode()
                    else:
                        data = change
            target.writestr(member.filename, data)
    return to


def graph_of(content: Any) -> Any:
    return content['graph_module']['graph']


@pytest.fixture(scope='module')
def plain(folder: Path) -> Callable[[str], Path]:
    return cache(lambda ending: made(folder / f'plain{ending}'))


@pytest.fixture
def change(plain: Any, tmp_path: Path) -> Callable[..., Path]:
    return lambda **changes: rewritten(
        plain('.pt2'), tmp_path / 'net.pt2',
        {name.replace('__', '/') + '.json': change for name, change in changes.items()},
    )  # fmt: skip


def test_a_copy_of_a_pt2_is_read(change: Any, plain: Any) -> None:
    a, b = port.load_exported(change())[1], port.load_exported(plain('.pt2'))[1]
    assert jax.tree.all(jax.tree.map(np.array_equal, a, b))


def test_nothing_is_unpickled(plain: Any, tmp_path: Path) -> None:
    """The sample inputs of a `.pt2` are a pickle, which `torch.export.load` runs."""
    path = rewritten(plain('.pt2'), tmp_path / 'net.pt2', {'sample_inputs/model.pt': b'not opened'})
    assert port.load_exported(path)[1]['params']


def test_pickled_weights(change: Any, plain: Any, tmp_path: Path) -> None:
    def pickled(content: Any) -> None:
        content['config']['conv.weight']['use_pickle'] = True

    refused(change(weights__model_weights_config=pickled), 'conv.weight is pickled')
    # PyTorch 2.8 has all weights in one pickle.
    path = rewritten(plain('.pt2'), tmp_path / 'old.pt2')
    with zipfile.ZipFile(path, 'a') as archive:
        archive.writestr('plain/data/weights/model.pt', b'')
    refused(path, 'pickled its weights', 'PyTorch 2.9')


def test_another_schema(change: Any) -> None:
    def older(content: Any) -> None:
        content['schema_version']['major'] = 7

    refused(change(models__model=older), 'its schema is 7', '8 is read')


@pytest.mark.parametrize('shape', [[10**9, 10**9, 3, 3], [4, 3, 3, 4], [-4, -3, 3, 3]])
def test_shapes_that_the_bytes_do_not_hold(shape: list[int], change: Any) -> None:
    def absurd(content: Any) -> None:
        sizes = [{'as_int': n} for n in shape]
        content['config']['conv.weight']['tensor_meta']['sizes'] = sizes

    refused(change(weights__model_weights_config=absurd), 'conv.weight has the shape')


def test_an_array_of_one_number_repeated(change: Any) -> None:
    def repeated(content: Any) -> None:
        meta = content['config']['conv.weight']['tensor_meta']
        meta['sizes'] = [{'as_int': 10**4}] * 4
        meta['strides'] = [{'as_int': 0}] * 4

    refused(change(weights__model_weights_config=repeated), 'conv.weight has the shape')


def test_an_offset_before_the_start(change: Any) -> None:
    def before(content: Any) -> None:
        content['config']['conv.weight']['tensor_meta']['storage_offset']['as_int'] = -8

    refused(change(weights__model_weights_config=before), 'conv.weight has the shape')


def test_a_cycle(change: Any) -> None:
    def cycle(content: Any) -> None:
        nodes = graph_of(content)['nodes']
        nodes[0]['inputs'][0]['arg'] = nodes[-1]['outputs'][0]

    refused(change(models__model=cycle), 'is no network', 'which nothing before it makes')


def test_a_result_that_is_made_twice(change: Any) -> None:
    def twice(content: Any) -> None:
        graph_of(content)['nodes'].append(graph_of(content)['nodes'][-1])

    refused(change(models__model=twice), 'is no network', 'again')


def test_an_array_larger_than_any_classifiers(change: Any) -> None:
    def huge(content: Any) -> None:
        size = {'name': 'size', 'arg': {'as_ints': [10**9, 10**9]}}
        value = {'name': 'fill_value', 'arg': {'as_float': 1.0}}
        graph_of(content)['nodes'].insert(0, {
            'target': 'torch.ops.aten.full.default', 'inputs': [size, value], 'metadata': {},
            'outputs': [{'as_tensor': {'name': 'huge'}}], 'name': 'huge',
        })  # fmt: skip
        followed(content, 'aten.add.Tensor', other={'as_tensor': {'name': 'huge'}})

    refused(change(models__model=huge), 'makes an array of shape [1000000000, 1000000000')


def test_a_bomb(plain: Any, tmp_path: Path) -> None:
    path = rewritten(plain('.pt2'), tmp_path / 'packed.pt2', compression=zipfile.ZIP_DEFLATED)
    refused(path, 'unpack')
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        for i in range(3):
            archive.writestr(f'net/data/weights/weight_{i}', bytes(10**8))
    refused(path, 'a zip bomb')


@pytest.mark.parametrize('size', [0, 3, 100, 2000])
@pytest.mark.parametrize('ending', ENDINGS)
def test_a_file_that_is_cut_short(ending: str, size: int, plain: Any, tmp_path: Path) -> None:
    path = tmp_path / f'net{ending}'
    path.write_bytes(plain(ending).read_bytes()[:size])
    refused(path)


def test_graphs_nested_too_deeply(plain: Any, tmp_path: Path) -> None:
    deep = b'[' * 10**5 + b']' * 10**5
    path = rewritten(plain('.pt2'), tmp_path / 'net.pt2', {'models/model.json': deep})
    refused(path, 'nested too deeply')


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_weights_that_are_not_finite(value: float, plain: Any, tmp_path: Path) -> None:
    wrong = np.full((4, 3, 3, 3), value, np.float32).tobytes()
    path = rewritten(plain('.pt2'), tmp_path / 'net.pt2', {'weights/weight_0': wrong})
    refused(path, 'conv.weight is not finite')


@pytest.fixture
def model(plain: Any) -> Any:
    return onnx.load(plain('.onnx'))


def outside(tensor: Any, location: str, **entries: Any) -> None:
    tensor.ClearField('raw_data')
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {'location': location, **entries}.items():
        tensor.external_data.add(key=key, value=str(value))


def conv_weight(model: Any) -> Any:
    return next(t for t in model.graph.initializer if t.name == 'conv.weight')


def test_weights_in_a_file_beside_it(model: Any, plain: Any, tmp_path: Path) -> None:
    data = conv_weight(model).raw_data
    (tmp_path / 'net.onnx.data').write_bytes(b'1234' + data)
    outside(conv_weight(model), 'net.onnx.data', offset=4, length=len(data))
    onnx.save(model, tmp_path / 'net.onnx')
    a = port.load_exported(tmp_path / 'net.onnx')[1]
    b = port.load_exported(plain('.onnx'))[1]
    assert jax.tree.all(jax.tree.map(np.array_equal, a, b))


@pytest.mark.parametrize(
    ('location', 'entries', 'word'),
    [
        ('../secret', {}, 'outside its folder'),
        ('/etc/passwd', {}, 'outside its folder'),
        ('link', {}, 'outside its folder'),
        ('', {}, 'outside its folder'),
        ('absent', {}, 'not beside it'),
        ('short', {}, 'does not hold'),
        ('short', {'length': 4}, 'does not hold'),
        ('long', {'offset': -4}, 'does not hold'),
    ],
)
def test_weights_outside_the_folder(
    location: str, entries: Any, word: str, model: Any, tmp_path: Path
) -> None:
    inside = tmp_path / 'inside'
    inside.mkdir()
    (tmp_path / 'secret').write_bytes(bytes(10**4))
    (inside / 'link').symlink_to(tmp_path / 'secret')
    (inside / 'short').write_bytes(bytes(10))
    (inside / 'long').write_bytes(bytes(10**4))
    outside(conv_weight(model), location, **entries)
    (inside / 'net.onnx').write_bytes(model.SerializeToString())
    refused(inside / 'net.onnx', word)


def test_an_old_opset(model: Any, tmp_path: Path) -> None:
    model.opset_import[0].version = 11
    (tmp_path / 'net.onnx').write_bytes(model.SerializeToString())
    refused(tmp_path / 'net.onnx', 'has the opset 11', 'onnx.version_converter.convert_version')


def test_onnx_shapes_that_the_bytes_do_not_hold(model: Any, tmp_path: Path) -> None:
    conv_weight(model).dims[0] = 10**9
    (tmp_path / 'net.onnx').write_bytes(model.SerializeToString())
    refused(tmp_path / 'net.onnx', 'which its bytes do not hold')


def test_onnx_cycles_functions_and_foreign_operators(model: Any, tmp_path: Path) -> None:
    path, first = tmp_path / 'net.onnx', next(n for n in model.graph.node if n.op_type == 'Conv')
    image, first.input[0] = first.input[0], model.graph.output[0].name
    path.write_bytes(model.SerializeToString())
    refused(path, 'which nothing before it makes')
    first.input[0], first.domain = image, 'com.microsoft'
    path.write_bytes(model.SerializeToString())
    refused(path, 'com.microsoft.Conv')
    model.functions.add(name='recursive')
    path.write_bytes(model.SerializeToString())
    refused(path, 'functions of its own (recursive)', 'inline_local_functions')


def test_images_of_bytes(model: Any, tmp_path: Path) -> None:
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.UINT8
    (tmp_path / 'net.onnx').write_bytes(model.SerializeToString())
    refused(tmp_path / 'net.onnx', 'it takes images of uint8')


def test_without_the_package_onnx(plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__('sys').modules, 'onnx', None)
    refused(plain('.onnx'), "pip install 'onnx>=1.21'")
    assert port.load_exported(plain('.pt2'))[1]


def test_what_is_no_exported_network(tmp_path: Path) -> None:
    with pytest.raises(PortError, match='there is no file'):
        port.load_exported(tmp_path / 'absent.pt2')
    (tmp_path / 'page.pt2').write_text('<html>')
    refused(tmp_path / 'page.pt2', 'no exported network')
    torch.save({'weight': torch.ones(2)}, tmp_path / 'weights.pt2')
    refused(tmp_path / 'weights.pt2', 'holds 0 graphs under models/')


# 5. As a teacher


class Teacher(nn.Module):
    """Of the digits: nothing of the zoo."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(exporting.conv(1, 8, 3, 2), exporting.Shuffle(8),
                                  exporting.conv(8, 8, 3, 2, groups=2))  # fmt: skip
        self.head = nn.Linear(8, 10)

    def forward(self, x: Any) -> Any:
        return self.head(self.body(x).mean((2, 3)))


@pytest.fixture(scope='module')
def teachers(folder: Path) -> dict[str, Path]:
    torch.manual_seed(0)
    program = exporting.program(exporting.norm(Teacher()), 8, 1)
    return {ending: exporting.save(program, folder / f'teacher{ending}') for ending in ENDINGS}


def tiny(method: str, teacher: Path) -> Any:
    """The digits run at 8 pixels with a given teacher, seconds long."""
    config = digits.get_config(f'{method},smoke')
    config.data.image_size = 8
    config.teacher.update(model='exported', checkpoint=str(teacher), train=False)
    config.synthesis.update(batch_size=8, student_batch_size=8, bank=16)
    if 'generator' in config:
        config.generator.width = 4
    config.phases = (common.phase(rounds=2, g_steps=1, s_steps=1),)
    return config


@pytest.mark.slow
@pytest.mark.parametrize('method', ['deepinversion', 'nayer'])
def test_a_run_from_a_pt2(method: str, teachers: Any, tmp_path: Path, fast_runs: None) -> None:
    """On four devices, with the statistics of its batch norms."""
    summary = loops.run(tiny(method, teachers['.pt2']), tmp_path / 'run')
    assert (summary['teacher'], summary['rounds']) == ('exported', 2)
    assert summary['teacher_queries'] > 0


@pytest.mark.slow
def test_a_run_from_an_onnx_is_continued(
    teachers: Any, tmp_path: Path, fast_runs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after a round and continued, it ends with the same weights."""
    config = tiny('deepinversion', teachers['.onnx'])
    assert loops.run(config, tmp_path / 'whole')['rounds'] == 2
    asked = iter([True])
    go = session.run
    monkeypatch.setattr(
        session, 'run', lambda work, workdir, _: go(work, workdir, lambda: next(asked, False))
    )
    assert loops.run(config, tmp_path / 'stopped') == {}
    assert not (tmp_path / 'stopped' / 'summary.json').exists()
    loops.run(config, tmp_path / 'stopped')
    name = 'student.safetensors'
    whole = (tmp_path / 'whole' / name).read_bytes()
    assert (tmp_path / 'stopped' / name).read_bytes() == whole


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'data__image_size': 16}, '(8, 8, 1), and the config says (16, 16, 1)'),
        ({'data__channels': 3}, '(8, 8, 1), and the config says (8, 8, 3)'),
        ({'data__num_classes': 7}, '10 classes, and the config says 7'),
        ({'teacher__checkpoint': None}, 'set --config.teacher.model=exported'),
        ({'teacher__checkpoint': 'weights.pth'}, 'FILE.pt2 (or .onnx)'),
        ({'student__model': 'exported'}, 'only a teacher may be one'),
        ({'teacher__checkpoint': '/nowhere/net.pt2'}, 'there is no file /nowhere/net.pt2'),
        ({'dtype': 'float16'}, 'expected one of float32, bfloat16'),
    ],
)
def test_what_does_not_fit_a_config(changes: Any, words: str, teachers: Any) -> None:
    config = tiny('nayer', teachers['.pt2'])
    for name, value in changes.items():
        *groups, field = name.split('__')
        (config[groups[0]] if groups else config)[field] = value
    with pytest.raises(UserError) as error:
        build.make_models(config, DataFacts())
    assert words in str(error.value) and '\n' not in str(error.value)


class DataFacts:
    mean, std, test_size = (0.5,), (0.5,), 1


def test_a_network_in_the_place_of_weights(teachers: Any) -> None:
    config = tiny('nayer', teachers['.onnx'])
    with pytest.raises(ConfigError, match='set --config.teacher.model=exported'):
        build.load_network(teachers['.onnx'], 'resnet8', config.data)


def test_a_file_is_read_once(
    teachers: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path, reads = tmp_path / 'net.pt2', []
    shutil.copy(teachers['.pt2'], path)
    config, load = tiny('nayer', path), port.load_exported
    monkeypatch.setattr(port, 'load_exported', lambda path: reads.append(path) or load(path))
    build.make_models(config, DataFacts())
    build.load_network(path, 'exported', config.data)
    assert reads == [path]
