"""A student leaves the library: every format computes what JAX does, and classifies pictures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import linen as nn
from PIL import Image

from dfkd_jax import build, data, export, models, port, predict
from dfkd_jax.configs import digits
from dfkd_jax.contract import Frozen
from dfkd_jax.deploy import card as cards
from dfkd_jax.deploy import classify, formats, onnx_writer, quantise, synthetic_images
from dfkd_jax.deploy import student as students
from dfkd_jax.errors import DeployError, UserError
from dfkd_jax.loops import supervised
from dfkd_jax.models import layers
from dfkd_jax.storage import files, model_folder
from dfkd_jax.storage.checkpoints import Checkpoints

pytestmark = pytest.mark.usefixtures('fast_runs')
ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = 1e-5


def onnx_model(content: bytes) -> Any:
    import onnx

    return onnx.load_from_string(content)


def operators(content: bytes) -> Counter[str]:
    """How often an ONNX file has each operator."""
    return Counter(node.op_type for node in onnx_model(content).graph.node)


def call_onnx(content: bytes) -> Callable[[np.ndarray], formats.Arrays]:
    return classify.onnx_call(classify.onnx_session(content, 'the file'), 'the file')


def card_of(name: str, size: int, channels: int = 3, classes: int = 10) -> cards.Card:
    return cards.of_entries(
        {
            'model': name, 'num_classes': classes, 'channels': channels, 'image_size': size,
            'resize': 'resize',
            'mean': [0.4, 0.5, 0.6][:channels], 'std': [0.2, 0.3, 0.4][:channels],
        },
        'the card',
    )  # fmt: skip


@cache
def drawn(name: str, size: int, channels: int = 3) -> dict[str, Any]:
    """Variables drawn by He's rule, and statistics that are no starting values."""
    module = models.make(name, num_classes=10)
    image = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)
    shapes = jax.eval_shape(lambda x: module.init(jax.random.key(0), x), image)
    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        x, last = rng.standard_normal(leaf.shape), path[-1].key
        if last == 'var':
            x = 0.5 + np.abs(x)
        elif last == 'scale':
            x = 1 + 0.1 * x
        elif len(leaf.shape) > 1:
            x = x * np.sqrt(2 / np.prod(leaf.shape[:-1]))
        else:
            x = 0.1 * x
        return x.astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


# 1. ONNX: the zoo.

CLASSIFIERS = [name for name in models.MODELS if not name.endswith('generator')] + [
    'resnet14_option_a', 'resnet18_pool', 'preact_resnet18', 'preact_resnet18_bn',
    'vgg11_bn_cifar', 'vgg11_cifar_4096', 'vgg11_imagenet',
]  # fmt: skip
# One of each family, and of what its operators differ in; the others take longer.
QUICK = (
    'lenet5', 'lenet5_half', 'resnet8', 'resnet8_half', 'resnet8_s2d', 'resnet20', 'wrn16_1',
    'vgg8', 'resnet14_option_a',
)  # fmt: skip


def smallest(name: str) -> int:
    """The side of the smallest images, of those tried, that a network takes."""
    for size in (32, 64, 224):
        try:
            drawn(name, size)
        except Exception:  # networks raise anything at an impossible size
            continue
        return size
    raise AssertionError(name)


@pytest.mark.parametrize(
    'name', [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
             for name in CLASSIFIERS]
)  # fmt: skip
def test_every_classifier_is_the_same_in_onnx(name: str) -> None:
    size = smallest(name)
    card, variables = card_of(name, size), drawn(name, size)
    content = formats.onnx(card, variables)
    assert formats.difference(card, variables, call_onnx(content)) <= TOLERANCE
    kinds = operators(content)
    assert 'BatchNormalization' not in kinds, 'folded, or a product and a sum'


def test_batch_norms_are_folded_and_maps_are_not_turned() -> None:
    kinds = operators(formats.onnx(card_of('resnet8', 32), drawn('resnet8', 32)))
    assert kinds['Conv'] == 9 and kinds['Add'] == 3, 'three sums of blocks, none of a batch norm'
    assert kinds['Mul'] == 0 and kinds['Transpose'] == 1, 'of the pixels, channels first'
    assert kinds['Gemm'] == 1 and kinds['Relu'] == 7


def test_a_wrong_file_is_noticed() -> None:
    card, variables = card_of('resnet8', 32), drawn('resnet8', 32)
    other = jax.tree.map(lambda x: x * np.float32(1.001), variables)
    with pytest.raises(DeployError, match='differs from JAX by'):
        formats.difference(card, variables, call_onnx(formats.onnx(card, other)))


def test_the_file_says_what_it_is() -> None:
    card = card_of('lenet5', 32)._replace(class_names=tuple('abcdefghij'), source={'dataset': 'x'})
    model = onnx_model(formats.onnx(card, drawn('lenet5', 32)))
    entries = {entry.key: entry.value for entry in model.metadata_props}
    assert cards.of_metadata(entries, 'the file') == card
    assert json.loads(entries['class_names']) == list('abcdefghij')
    assert json.loads(entries['std']) == pytest.approx([0.2, 0.3, 0.4])
    [pixels] = model.graph.input
    shape = pixels.type.tensor_type.shape.dim
    assert [each.dim_param or each.dim_value for each in shape] == ['batch', 32, 32, 3]


# 2. ONNX: primitives that other networks use.


def attention(x: jax.Array) -> jax.Array:
    """Two heads, over the rows of an image; a token of its own in front."""
    tokens = x.reshape(x.shape[0], 8, 24)
    first = jnp.broadcast_to(jnp.linspace(-1.0, 1.0, 24), (x.shape[0], 1, 24))
    tokens = jnp.concatenate([first, tokens], axis=1)
    queries, keys, values = jnp.split(jnp.concatenate([tokens, tokens * 0.5, -tokens], -1), 3, -1)
    heads = [part.reshape(x.shape[0], 9, 2, 12) for part in (queries, keys, values)]
    scores = jnp.einsum('bqhd,bkhd->bhqk', heads[0], heads[1]) / 12**0.5
    out = jnp.einsum('bhqk,bkhd->bqhd', jax.nn.softmax(scores), heads[2])
    return out.reshape(x.shape[0], 9, 24)[:, 0]


def layer_norm(x: jax.Array) -> jax.Array:
    mean = jnp.mean(x, -1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(jnp.var(x, -1, keepdims=True) + 1e-6)


def group_norm(x: jax.Array) -> jax.Array:
    groups = convolution(x, 6).reshape(-1, 8, 8, 2, 3)
    mean = jnp.mean(groups, (1, 2, 4), keepdims=True)
    return ((groups - mean) / jnp.std(groups, (1, 2, 4), keepdims=True)).reshape(-1, 8, 8, 6)


def shuffle(x: jax.Array) -> jax.Array:
    x = convolution(x, 6)
    return x.reshape(-1, 8, 8, 2, 3).swapaxes(3, 4).reshape(-1, 8, 8, 6)


def kernel(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32) / 3


def convolution(x: jax.Array, features: int, **options: Any) -> jax.Array:
    options = {'window_strides': (1, 1), 'padding': 'SAME', **options}
    groups = options.get('feature_group_count', 1)
    weight = kernel(3, 3, x.shape[-1] // groups, features)
    return jax.lax.conv_general_dilated(
        x, weight, dimension_numbers=('NHWC', 'HWIO', 'NHWC'), **options
    )


def upsampled(x: jax.Array) -> jax.Array:
    return convolution(x, 4, padding=((1, 1), (1, 1)), lhs_dilation=(2, 2))


def squeeze_and_excite(x: jax.Array) -> jax.Array:
    x = convolution(x, 4)
    gate = jnp.mean(x, (1, 2), keepdims=True)
    gate = nn.hard_sigmoid(jax.lax.conv_general_dilated(
        gate, kernel(1, 1, 4, 4), (1, 1), 'VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    ))  # fmt: skip
    return x * gate


FUNCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    'attention': attention,
    'layer_norm': layer_norm,
    'group_norm': group_norm,
    'channel_shuffle': shuffle,
    'squeeze_and_excite': squeeze_and_excite,
    'gelu': lambda x: jax.nn.gelu(x, approximate=False),
    'gelu_tanh': lambda x: jax.nn.gelu(x, approximate=True),
    'silu': jax.nn.silu,
    'hard_swish': nn.hard_swish,
    'elu': jax.nn.elu,
    'softplus': jax.nn.softplus,
    'leaky_relu': jax.nn.leaky_relu,
    'erf': jax.scipy.special.erf,
    'clip': lambda x: jnp.clip(x, -0.25, 0.3),
    'powers': lambda x: x**3 + jnp.abs(x) ** 1.5 - jnp.sign(x + 0.01) * jnp.sqrt(jnp.abs(x) + 1),
    'where': lambda x: jnp.where((x > 0.1) & (x != 0.3) | ~(x >= -0.2), x, -2.0 * x),
    'sines': lambda x: jnp.sin(x) * jnp.cos(x) + jnp.floor(4 * x + 0.12) - jnp.ceil(x + 0.03),
    'exp_and_log': lambda x: jnp.log1p(jnp.exp(x)) + jnp.expm1(x) + jnp.log(2 + x),
    'grouped': lambda x: convolution(convolution(x, 6), 4, feature_group_count=2),
    'strided': lambda x: convolution(x, 4, window_strides=(2, 2)),
    'dilated': lambda x: convolution(x, 4, rhs_dilation=(2, 2)),
    'uneven_padding': lambda x: convolution(x, 4, padding=((0, 2), (1, 0))),
    'depthwise': lambda x: layers.convolve(
        convolution(x, 4), kernel(3, 3, 1, 4), (1, 1), ((1, 1), (1, 1)), feature_group_count=4,
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    ),
    'average_pool': lambda x: nn.avg_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1))),
    'average_pool_of_images': lambda x: nn.avg_pool(
        x, (3, 3), (2, 2), ((1, 1), (1, 1)), count_include_pad=False
    ),
    'max_pool': lambda x: nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1))),
    'max_pool_ceil': lambda x: nn.max_pool(x, (3, 3), (2, 2), ((0, 1), (0, 1))),
    'concatenate_and_split': lambda x: jnp.concatenate(jnp.split(convolution(x, 6), 3, -1), 1),
    'slices': lambda x: x[:, 1:-1, ::2, ::-1],
    'strided_slices': lambda x: convolution(x, 4)[:, ::2, ::2],
    'flipped': lambda x: jnp.flip(x, (1, 3)),
    'one_pixel': lambda x: convolution(x, 4)[:, 3, -2],
    'rows_and_columns': lambda x: x[:, np.array([[3], [0], [5]]), np.array([[1, 2]])],
    'one_row': lambda x: convolution(x, 4)[:, 3],
    'rows_by_number': lambda x: x[:, np.array([3, 0, 5, 5])],
    'channels_by_number': lambda x: convolution(x, 4)[..., np.array([3, 0, 2])],
    'roll': lambda x: jnp.roll(x, (3, -2), (1, 2)),
    'padded': lambda x: jnp.pad(x, ((0, 0), (1, 2), (0, 0), (0, 1)), constant_values=0.5),
    'extremes': lambda x: jnp.max(convolution(x, 4), (1, 2)) - jnp.min(x, (1, 2))[:, :1],
    'products': lambda x: jnp.einsum('bhwc,bkwd->bhkcd', x, convolution(x, 4)),
    'product_of_several': lambda x: jnp.einsum('bhwc,hcd->bwd', x, kernel(8, 3, 5)),
    'product_of_the_other_side': lambda x: jnp.einsum('de,bhwe->bhwd', kernel(5, 3), x),
    'resized': lambda x: jax.image.resize(x, (x.shape[0], 12, 12, 3), 'bilinear'),
    'nearest': layers.upsample2,
    'space_to_depth': lambda x: layers.space_to_depth(x, 2),
    'scaled_branch': lambda x: convolution(x, 4) * kernel(1, 1, 1, 4) + kernel(4),
    'used_twice': lambda x: (lambda y: y * kernel(1, 1, 1, 4) + y)(convolution(x, 4)),
}  # fmt: skip


@pytest.mark.parametrize('name', FUNCTIONS)
def test_primitives_are_the_same_in_onnx(name: str) -> None:
    def fn(variables: Any, pixels: Any) -> tuple[jax.Array]:
        with jax.numpy_rank_promotion('allow'), jax.numpy_dtype_promotion('standard'):
            images = data.normalise(pixels, (0.4, 0.5, 0.6), (0.5, 0.5, 0.5))
            return (FUNCTIONS[name](images) + variables['zero'],)

    import onnxruntime

    variables = {'zero': np.zeros((), np.float32)}
    model = onnx_writer.write(fn, variables, (8, 8, 3), ('result',), {})
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=['CPUExecutionProvider']
    )
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
    wanted = np.asarray(jax.jit(fn)(variables, pixels)[0])
    assert np.ptp(wanted) > 0.1, 'it depends on the images'
    for batch in (1, 5):
        [found] = session.run(None, {'pixels': pixels[:batch]})
        assert found.shape == (batch, *wanted.shape[1:])
        np.testing.assert_allclose(
            found, wanted[:batch], rtol=0, atol=TOLERANCE * max(1, np.abs(wanted).max())
        )


@pytest.mark.parametrize(
    ('name', 'fn'),
    [
        ('sort', lambda x: jnp.sort(x, axis=1)),
        ('cumsum', lambda x: jnp.cumsum(x, axis=1)),
        ('pad', lambda x: jax.lax.pad(x, jnp.float32(0), 2 * [(0, 0, 0)] + 2 * [(-1, 0, 0)])),
        ('conv_general_dilated', upsampled),
        ('gather', lambda x: jnp.take_along_axis(x, (x > 9).astype(jnp.int32), 1)),
    ],
)
def test_an_unknown_primitive_is_named_in_one_line(name: str, fn: Any) -> None:
    def images(variables: Any, pixels: Any) -> tuple[jax.Array]:
        return (fn(pixels.astype(jnp.float32)),)

    with pytest.raises(DeployError, match=name) as error:
        onnx_writer.write(images, {}, (8, 8, 3), ('result',), {})
    assert '\n' not in str(error.value) and '--format=stablehlo' in str(error.value)


# 3. StableHLO.


@pytest.mark.parametrize('name', ['resnet8', pytest.param('mobilenetv2', marks=pytest.mark.slow)])
def test_stablehlo_is_the_same_without_the_network(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card, variables = card_of(name, 32), drawn(name, 32)
    content = formats.stablehlo(card, variables)
    exported = jax.export.deserialize(bytearray(content))
    assert exported.platforms == ('cpu', 'cuda', 'tpu')
    path = tmp_path / 'a.stablehlo'
    formats.write(path, content, card)
    with monkeypatch.context() as patch:
        patch.setattr(models, 'make', None)
        found, call = classify.load(path)
        call(np.zeros((3, 32, 32, 3), np.uint8))
    assert found == card
    assert formats.difference(card, variables, call) <= TOLERANCE


@pytest.mark.parametrize('groups', [1, 2, 4])
def test_a_convolution_takes_a_symbolic_batch(groups: int) -> None:
    def fn(x: jax.Array) -> jax.Array:
        return layers.convolve(
            x, kernel(3, 3, 4 // groups, 4), (1, 1), ((1, 1), (1, 1)),
            feature_group_count=groups, dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        )  # fmt: skip

    [batch] = jax.export.symbolic_shape('batch')
    exported = jax.export.export(jax.jit(fn))(jax.ShapeDtypeStruct((batch, 9, 9, 4), jnp.float32))
    x = kernel(3, 9, 9, 4)
    np.testing.assert_allclose(exported.call(x), fn(x), atol=1e-5)


# 4. From a run.


def small() -> Any:
    """A run on the digits at 8 pixels, whose teacher is of the student's size."""
    config = digits.get_config('dafl,smoke')
    config.data.image_size = 8
    config.teacher.model = 'resnet8_half'
    config.teach.update(epochs=3, batch_size=64, save_every_epochs=9, eval_every_epochs=9)
    config.generator.update(latent=8, width=4)
    config.synthesis.update(batch_size=32, student_batch_size=8)
    config.parallel = 'jit'
    return config


@pytest.fixture(scope='module')
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of a run, at round 0, but for the student: it is the teacher, which is trained.

    (A student that INT8 can do harm to takes minutes.)
    """
    folder, config = tmp_path_factory.mktemp('deploy') / 'run', small()
    files.write_json(folder / 'config.json', files.plain(config))
    supervised.run(config, folder / 'teacher')
    variables = model_folder.load_model(folder / 'teacher')[1]
    built = build.build(config)
    state = built.plan.call(built.whole.init)(Frozen(variables), jax.random.key(0))
    with Checkpoints(folder / 'checkpoints') as checkpoints:
        checkpoints.save(1, state, {})
    model_folder.save_classifier(
        folder / 'student', 'resnet8_half', variables, config.data, method='dafl',
        **model_folder.preparation(config.data, built.facts),
    )  # fmt: skip
    return folder


@pytest.fixture(scope='module')
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Digits as PNG and JPEG files, one of them larger and in colour."""
    folder = tmp_path_factory.mktemp('pictures')
    test = data.load(small().data, 'test')
    paths = []
    for i, suffix in enumerate(('png', 'jpg', 'png')):
        image = Image.fromarray(test.images[i].squeeze())
        if i == 2:
            image = image.resize((40, 30)).convert('RGB')
        paths.append(folder / f'{i}.{suffix}')
        image.save(paths[-1])
    return paths


@pytest.fixture(scope='module')
def exported(run: Path) -> dict[str, Path]:
    """A file of each format, from the run."""
    found = {}
    for format in ('onnx', 'stablehlo', 'safetensors', 'torch'):
        export.main(['--student', str(run), '--format', format])
        found[format] = run / 'export' / f'student{formats.SUFFIXES[format]}'
    export.main(['--student', str(run), '--int8'])
    return {**found, 'int8': run / 'export' / 'student_int8.onnx'}


def wanted(run: Path, pictures: list[Path]) -> np.ndarray:
    """The probabilities of the pictures, by the network itself."""
    card, variables = model_folder.load_model(run / 'student')
    module = models.make(card['model'], num_classes=10)
    pixels = [
        Image.open(path).convert('L').resize((8, 8), Image.Resampling.BILINEAR) for path in pictures
    ]
    images = np.stack([np.asarray(each) for each in pixels])[..., None]
    logits = module.apply(variables, (images.astype(np.float32) / 255 - 0.5) / 0.5).logits
    return np.asarray(jax.nn.softmax(logits))


def test_a_run_leaves_a_card_that_is_enough(run: Path, tmp_path: Path) -> None:
    found = students.load(run)
    assert found.card.resize == 'resize' and found.card.mean == (0.5,)
    assert found.card.class_names == tuple('0123456789')
    assert found.card.source['dataset'] == 'digits' and found.card.source['method'] == 'dafl'
    # The folder alone, elsewhere.
    (tmp_path / 'alone').mkdir()
    for path in (run / 'student').iterdir():
        (tmp_path / 'alone' / path.name).write_bytes(path.read_bytes())
    assert students.load(tmp_path / 'alone').card == found.card
    assert students.load(run / 'student').card == found.card
    teacher = students.load(run / 'teacher').card
    assert (teacher.model, teacher.mean, teacher.resize) == ('resnet8_half', (0.5,), 'resize')
    assert teacher.source['accuracy'] > 80 and teacher.source['role'] == 'teacher'


def test_an_older_folder_falls_back_on_the_config(run: Path, tmp_path: Path) -> None:
    for name in ('config.json', 'student/model.json', 'student/variables.safetensors'):
        files.write_bytes(tmp_path / name, (run / name).read_bytes())
    entries = files.read_json(run / 'student/model.json')
    for name in ('mean', 'std', 'resize', 'class_names'):
        del entries[name]
    files.write_json(tmp_path / 'student/model.json', entries)
    assert students.load(tmp_path).card == students.load(run).card
    (tmp_path / 'config.json').unlink()
    with pytest.raises(DeployError, match=r'does not say how images are prepared \(mean, std'):
        students.load(tmp_path)


@pytest.mark.parametrize('format', ['onnx', 'stablehlo', 'safetensors', 'torch', 'run', 'folder'])
def test_every_format_classifies_pictures(
    format: str,
    run: Path,
    pictures: list[Path],
    exported: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {**exported, 'run': run, 'folder': run / 'student'}
    predict.main(['--model', str(places[format]), '--json', *map(str, pictures)])
    results = json.loads(capsys.readouterr().out)
    assert [result['image'] for result in results] == list(map(str, pictures))
    for result, expected in zip(results, wanted(run, pictures), strict=True):
        assert result['error'] == '' and len(result['top']) == 5
        best = np.argsort(-expected)[:5].tolist()
        assert [answer['label'] for answer in result['top']] == best
        assert [answer['name'] for answer in result['top']] == list(map(str, best))
        shares = [answer['probability'] for answer in result['top']]
        np.testing.assert_allclose(shares, expected[best], atol=TOLERANCE)


def test_pictures_are_told_in_lines(
    run: Path, pictures: list[Path], exported: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    predict.main(['--model', str(exported['onnx']), '--top', '2', *map(str, pictures[:2])])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and lines[0] == str(pictures[0])
    best = wanted(run, pictures)[0]
    assert lines[1] == f'  {100 * best.max():6.2f} %  {best.argmax()}'


def test_int8_says_what_it_costs(
    run: Path, exported: dict[str, Path], pictures: list[Path]
) -> None:
    path = exported['int8']
    entries = {each.key: each.value for each in onnx_model(path.read_bytes()).metadata_props}
    figures = files.read_json(formats.card_path(path))
    for name in ('agreement_with_float32', 'agreement_with_teacher', 'accuracy'):
        assert json.loads(entries[name]) == figures[name]
    assert figures['test_images'] == 360 and figures['calibration_images'] == 256
    assert figures['accuracy']['float32'] > 80
    assert abs(figures['accuracy']['int8'] - figures['accuracy']['float32']) < 3
    assert 95 < figures['agreement_with_float32'] <= 100
    # The teacher is the same network here.
    both = {'float32': 100.0, 'int8': figures['agreement_with_float32']}
    assert figures['agreement_with_teacher'] == pytest.approx(both)
    call = call_onnx(path.read_bytes())
    test = data.load(small().data, 'test')
    right = call(test.images)[0].argmax(-1) == test.labels
    assert 100 * np.mean(right) == pytest.approx(figures['accuracy']['int8'])
    kinds = operators(path.read_bytes())
    assert kinds['QuantizeLinear'] > 5 and kinds['DequantizeLinear'] > 10
    weights = [each.data_type for each in onnx_model(path.read_bytes()).graph.initializer
               if len(each.dims) == 4 and each.dims[0] > 1]  # fmt: skip
    assert weights == 9 * [3], 'int8'
    assert path.stat().st_size < exported['onnx'].stat().st_size


def test_int8_is_calibrated_on_synthetic_images(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for a seed, others for another; real images are not opened."""
    monkeypatch.setattr(data, 'load', None)
    student = students.load(run)
    first, again, other = (synthetic_images.draw(student, 40, seed) for seed in (1, 1, 2))
    assert first.shape == (40, 8, 8, 1) and first.dtype == np.uint8
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert first.std() > 1 and len(np.unique(first.reshape(40, -1), axis=0)) == 40


def test_contrast_is_stretched() -> None:
    pixels = np.array([[[[100], [110]], [[105], [120]]], np.full((2, 2, 1), 7)], np.uint8)
    found = quantise.stretched(pixels)
    assert found.dtype == np.uint8 and not found[1].any()
    assert found[0, ..., 0].tolist() == [[0, 128], [64, 255]]


def test_int8_without_test_images_measures_agreement(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dfkd_jax.errors import DataError

    def load(*args: Any) -> None:
        raise DataError('there are none')

    monkeypatch.setattr(data, 'load', load)
    export.main(['--student', str(run), '--int8', '--output', str(tmp_path / 'a.onnx')])
    assert 'no test images, so no accuracy' in capsys.readouterr().out
    figures = files.read_json(tmp_path / 'a.onnx.json')
    assert 'accuracy' not in figures and figures['agreement_with_float32'] > 90


def test_pytorch_files_are_as_pytorch_wants_them(run: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip('torch', reason='pip install torch')
    path = tmp_path / 'student.pth'
    export.main(['--student', str(run), '--format', 'torch', '--output', str(path)])
    state = torch.load(path, weights_only=True)
    expected = port.to_torch('resnet8_half', model_folder.load_model(run / 'student')[1])
    assert state.keys() == expected.keys()
    assert all(np.array_equal(state[name].numpy(), x) for name, x in expected.items())
    card = files.read_json(tmp_path / 'student.pth.json')
    assert card['mean'] == [0.5] and card['image_size'] == 8


# 5. What is refused, in one line.


def refused(capsys: pytest.CaptureFixture[str], main: Any, *arguments: Any) -> str:
    """The one line with which a command ends."""
    with pytest.raises(SystemExit) as end:
        main(list(map(str, arguments)))
    assert end.value.code == 1
    text = capsys.readouterr().err
    assert text.startswith('error: ') and text.count('\n') == 1
    return text


def test_nothing_is_overwritten(
    run: Path, exported: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    before = exported['onnx'].read_bytes()
    text = refused(capsys, export.main, '--student', run)
    assert 'is there already' in text and '--overwrite' in text
    export.main(['--student', str(run), '--overwrite'])
    assert exported['onnx'].read_bytes() == before, 'and it is the same again'


def test_a_home_folder_is_meant(
    run: Path, pictures: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv('HOME', str(tmp_path))
    (tmp_path / 'run').symlink_to(run)
    (tmp_path / 'x.png').write_bytes(pictures[0].read_bytes())
    export.main(['--student', '~/run', '--format', 'safetensors', '--output', '~/a.safetensors'])
    assert (tmp_path / 'a.safetensors').is_file()
    predict.main(['--model', '~/a.safetensors', '~/x.png'])


def test_mistakes_of_export(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert 'is not there' in refused(capsys, export.main, '--student', tmp_path / 'no')
    assert 'no run and no model' in refused(capsys, export.main, '--student', tmp_path)
    files.write_json(tmp_path / 'begun/config.json', {'loop': 'alternating'})
    text = refused(capsys, export.main, '--student', tmp_path / 'begun')
    assert 'has not left its student yet' in text
    text = refused(capsys, export.main, '--student', run, '--format', 'stablehlo', '--int8')
    assert '--int8 writes ONNX' in text
    assert 'is a folder' in refused(capsys, export.main, '--student', run, '--output', tmp_path)
    text = refused(capsys, export.main, '--student', run, '--format', 'litert')
    assert 'pip install' in text and 'litert' in text


def test_int8_needs_a_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (run / 'student').iterdir():
        files.write_bytes(tmp_path / 'alone' / path.name, path.read_bytes())
    text = refused(capsys, export.main, '--student', tmp_path / 'alone', '--int8')
    assert 'is not the student of a run' in text
    # A run without its checkpoints, and one on real images.
    for name in ('config.json', 'student/model.json', 'student/variables.safetensors'):
        files.write_bytes(tmp_path / 'run' / name, (run / name).read_bytes())
    text = refused(capsys, export.main, '--student', tmp_path / 'run', '--int8')
    assert 'has no checkpoints/' in text
    config = files.read_json(run / 'config.json')
    files.write_json(tmp_path / 'run/config.json', {**config, 'loop': 'kd', 'method': 'kd'})
    text = refused(capsys, export.main, '--student', tmp_path / 'run', '--int8')
    assert 'distilled on real images' in text


def test_a_bank_of_files_calibrates_too(run: Path, tmp_path: Path) -> None:
    from dfkd_jax.data import synthetic

    student = students.load(run)
    config = student.config.copy_and_resolve_references()
    config.loop = 'offline'
    config.synthesis = {'bank': None}
    rng = np.random.default_rng(0)
    for number in range(3):
        image = rng.integers(0, 256, (8, 20, 20, 1), np.uint8)
        synthetic.write(tmp_path / 'bank', number, image, np.zeros(8), 0, {})
    offline = student._replace(run=tmp_path, config=config)
    images = synthetic_images.draw(offline, 10, 1)
    assert images.shape == (10, 8, 8, 1)
    with pytest.raises(DeployError, match='has no synthetic images'):
        synthetic_images.draw(offline._replace(run=tmp_path / 'no'), 10, 1)


def test_images_that_cannot_be_read_are_told_and_the_others_classified(
    run: Path, pictures: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / 'broken.png'
    broken.write_bytes(pictures[0].read_bytes()[:60])
    text = tmp_path / 'text.jpg'
    text.write_text('no picture')
    bad = [broken, text, tmp_path / 'no.png', tmp_path]
    arguments = ['--model', str(run / 'student'), *map(str, [pictures[0], *bad, pictures[1]])]
    with pytest.raises(SystemExit) as end:
        predict.main(arguments)
    assert end.value.code == 1
    said = capsys.readouterr()
    assert str(pictures[0]) in said.out and str(pictures[1]) in said.out
    lines = said.err.splitlines()
    assert len(lines) == len(bad) and all(line.startswith('error: ') for line in lines)
    for line, path in zip(lines, bad, strict=True):
        assert str(path) in line
    with pytest.raises(SystemExit):
        predict.main([*arguments, '--json'])
    results = json.loads(capsys.readouterr().out)
    assert [bool(result['error']) for result in results] == [False] + 4 * [True] + [False]


def test_sixteen_bits_are_not_white(tmp_path: Path) -> None:
    ramp = np.arange(256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(ramp << 8).save(tmp_path / 'a.png')
    pixels = classify.read_image(tmp_path / 'a.png', card_of('resnet8', 16, channels=1))
    assert np.array_equal(pixels[..., 0], ramp)


def test_a_network_that_pads_takes_no_larger_image(tmp_path: Path) -> None:
    card = card_of('resnet8', 16, channels=1)._replace(resize='pad')
    Image.new('L', (8, 8), 255).save(tmp_path / 'small.png')
    pixels = classify.read_image(tmp_path / 'small.png', card)
    assert pixels.sum() == 64 * 255 and pixels[4, 4, 0] == 255 and pixels[3, 4, 0] == 0
    Image.new('L', (20, 20)).save(tmp_path / 'large.png')
    with pytest.raises(UserError, match='20x20 pixels do not fit into 16x16.*pads'):
        classify.read_image(tmp_path / 'large.png', card)


def test_mistakes_of_predict(
    run: Path,
    exported: dict[str, Path],
    pictures: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def error(model: Path, *more: str) -> str:
        return refused(capsys, predict.main, '--model', model, *more, pictures[0])

    assert 'there is no' in error(tmp_path / 'no.onnx')
    assert 'expected 1 or more' in error(run, '--top=0')
    (tmp_path / 'a.txt').write_text('x')
    assert 'expected .onnx, .stablehlo, .safetensors' in error(tmp_path / 'a.txt')
    for name, what in (
        ('a.onnx', 'no ONNX model'), ('a.safetensors', 'not a whole safetensors file'),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(b'nothing of the kind')
        assert what in error(tmp_path / name)
    # A program without its card, and damaged.
    program = tmp_path / 'a.stablehlo'
    program.write_bytes(exported['stablehlo'].read_bytes())
    assert 'a.stablehlo.json is missing' in error(program)
    formats.card_path(program).write_bytes(formats.card_path(exported['stablehlo']).read_bytes())
    program.write_bytes(program.read_bytes()[:1000])
    assert 'cannot be read by jax' in error(program)
    # Weights of the run that do not say what they are, and a card of another network.
    safetensors.numpy.save_file({'a': np.zeros(1)}, tmp_path / 'c.safetensors')
    assert 'does not say its model' in error(tmp_path / 'c.safetensors')
    arrays = files.load_arrays(exported['safetensors'])
    other = cards.metadata(students.load(run).card._replace(model='resnet20'), layout='flax')
    (tmp_path / 'b.safetensors').write_bytes(safetensors.numpy.save(arrays, metadata=other))
    assert 'do not fit the network resnet20' in error(tmp_path / 'b.safetensors')


def test_a_foreign_onnx_file_is_refused(tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3]) for name in 'xy')
    graph = helper.make_graph([helper.make_node('Relu', ['x'], ['y'])], 'g', [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=8)
    (tmp_path / 'a.onnx').write_bytes(model.SerializeToString())
    with pytest.raises(DeployError, match='does not say its model, num_classes'):
        classify.load(tmp_path / 'a.onnx')
    onnx.helper.set_model_props(model, cards.metadata(card_of('resnet8', 16)))
    (tmp_path / 'a.onnx').write_bytes(model.SerializeToString())
    with pytest.raises(DeployError, match=r'expected pixels \(uint8\)'):
        classify.load(tmp_path / 'a.onnx')


@pytest.mark.parametrize(
    ('change', 'what'),
    [
        ({'num_classes': 1}, 'num_classes 1'),
        ({'channels': 2}, 'channels 2'),
        ({'image_size': 10**9}, 'image_size'),
        ({'image_size': 'x'}, 'wrong entry'),
        ({'resize': 'stretch'}, "resize 'stretch'"),
        ({'mean': [0.5]}, '1 means and 3 stds'),
        ({'std': [0.5, 0.0, 0.5]}, 'positive std'),
        ({'mean': [0.5, float('nan'), 0.5]}, 'finite'),
        ({'class_names': ['a', 'b']}, '2 class names for 10 classes'),
        ({'model': None}, 'does not say its model'),
    ],
)
def test_an_impossible_card_is_refused(change: dict[str, Any], what: str) -> None:
    entries = {**card_of('resnet8', 16)._asdict(), **change}
    with pytest.raises(DeployError, match=what) as error:
        cards.of_entries(entries, 'card.json')
    assert '\n' not in str(error.value)


def test_class_names_of_imagenet_are_words() -> None:
    entries = {**card_of('resnet8', 16, classes=1000)._asdict(), 'source': {'dataset': 'imagenet'}}
    for names in ((), [f'n{number:08d}' for number in range(1000)]):
        found = cards.of_entries({**entries, 'class_names': names}, 'card.json')
        assert found.class_names[1].startswith('goldfish')
    assert cards.of_entries({**entries, 'class_names': list(map(str, range(1000)))},
                            'card.json').class_names[1] == '1'  # fmt: skip
    assert card_of('resnet8', 16).class_names[3] == 'class 3'


# 6. All of it, as a user does it.


@pytest.mark.slow
@pytest.mark.parametrize('images', ['none', 'test'])
def test_from_a_checkpoint_to_an_int8_student(
    images: str, run: Path, tmp_path: Path, pictures: list[Path]
) -> None:
    """Every step a command.  With no image anywhere, only agreement is told."""

    def command(module: str, *arguments: Any) -> str:
        done = subprocess.run(
            [sys.executable, '-m', f'dfkd_jax.{module}', *map(str, arguments)],
            capture_output=True, text=True, cwd=tmp_path,
            env={**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    checkpoint = tmp_path / 'teacher.safetensors'  # of PyTorch's names, as people publish them
    weights = model_folder.load_model(run / 'teacher')[1]
    safetensors.numpy.save_file(port.to_torch('resnet8_half', weights), checkpoint)
    nothing = [
        '--config.data.name=', '--config.data.mean=(0.5,)', '--config.data.std=(0.5,)',
    ]  # fmt: skip
    command(
        'main', '--config=digits:dafl,smoke', '--workdir=run', '--config.teacher.train=False',
        f'--config.teacher.checkpoint={checkpoint}', '--config.teacher.model=resnet8_half',
        '--config.data.image_size=8', *(nothing if images == 'none' else ()),
    )  # fmt: skip
    said = command('export', '--student=run', '--int8')
    assert 'int8, calibrated on 256 synthetic images' in said
    assert ('no test images, so no accuracy' in said) == (images == 'none')
    assert ('accuracy on the test images' in said) == (images == 'test')
    said = command('predict', '--model=run/export/student_int8.onnx', *pictures)
    assert said.count(' %  ') == 5 * len(pictures)
    assert ('%  class ' in said) == (images == 'none'), 'classes without names have numbers'
