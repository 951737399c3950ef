"""Diffusion models: the reference's numbers, the published sizes and names, shapes refused."""

from __future__ import annotations

import functools
import math
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import last, near
from tiny import arrays

from dfkd_jax import diffusion
from dfkd_jax.diffusion import clip_text, folder, unet, vae
from dfkd_jax.diffusion.clip_text import CLIPText
from dfkd_jax.diffusion.unet import UNet
from dfkd_jax.diffusion.vae import AutoencoderKL
from dfkd_jax.errors import DiffusionError

pytestmark = pytest.mark.usefixtures('fast_compilation')

PROMPTS = ['a realistic photo', 'a photo of a cat', '']

DDPM = {
    '_class_name': 'UNet2DModel', 'attention_head_dim': None, 'downsample_padding': 0,
    'block_out_channels': [128, 256, 256, 256], 'flip_sin_to_cos': False, 'freq_shift': 1,
    'down_block_types': ['DownBlock2D', 'AttnDownBlock2D', 'DownBlock2D', 'DownBlock2D'],
    'in_channels': 3, 'layers_per_block': 2, 'mid_block_scale_factor': 1, 'norm_eps': 1e-6,
    'norm_num_groups': 32, 'out_channels': 3, 'sample_size': 32,
    'up_block_types': ['UpBlock2D', 'UpBlock2D', 'AttnUpBlock2D', 'UpBlock2D'],
}  # fmt: skip
SD1 = {
    '_class_name': 'UNet2DConditionModel', 'attention_head_dim': 8, 'cross_attention_dim': 768,
    'block_out_channels': [320, 640, 1280, 1280], 'center_input_sample': False,
    'down_block_types': ['CrossAttnDownBlock2D'] * 3 + ['DownBlock2D'], 'downsample_padding': 1,
    'flip_sin_to_cos': True, 'freq_shift': 0, 'in_channels': 4, 'layers_per_block': 2,
    'norm_eps': 1e-5, 'norm_num_groups': 32, 'out_channels': 4, 'sample_size': 64,
    'up_block_types': ['UpBlock2D'] + ['CrossAttnUpBlock2D'] * 3,
}  # fmt: skip
SD2 = SD1 | {'attention_head_dim': [5, 10, 20, 20], 'cross_attention_dim': 1024,
             'use_linear_projection': True, 'upcast_attention': True}  # fmt: skip
VAE = {
    '_class_name': 'AutoencoderKL', 'block_out_channels': [128, 256, 512, 512],
    'down_block_types': ['DownEncoderBlock2D'] * 4, 'in_channels': 3, 'latent_channels': 4,
    'layers_per_block': 2, 'norm_num_groups': 32, 'out_channels': 3, 'sample_size': 512,
    'up_block_types': ['UpDecoderBlock2D'] * 4,
}  # fmt: skip
CLIP_L = {
    'architectures': ['CLIPTextModel'], 'hidden_act': 'quick_gelu', 'hidden_size': 768,
    'intermediate_size': 3072, 'layer_norm_eps': 1e-5, 'max_position_embeddings': 77,
    'num_attention_heads': 12, 'num_hidden_layers': 12, 'vocab_size': 49408,
}  # fmt: skip


def tiny(config: dict, **changes: Any) -> dict:
    """A configuration of two narrow levels, the finer one with attention in a conditional one."""
    sizes: dict = dict(block_out_channels=[8, 16], norm_num_groups=4, layers_per_block=1)
    if config['_class_name'] != 'AutoencoderKL':
        sizes['down_block_types'] = config['down_block_types'][:1] + ['DownBlock2D']
        sizes['up_block_types'] = ['UpBlock2D'] + config['up_block_types'][-1:]
    else:
        sizes |= {key: config[key][:2] for key in ('down_block_types', 'up_block_types')}
    if 'cross_attention_dim' in config:
        sizes |= {'cross_attention_dim': 6, 'attention_head_dim': 2}
    return config | sizes | changes


@pytest.fixture(scope='module')
def sd(golden: Path):
    pytest.importorskip('tokenizers', reason='pip install tokenizers')
    return load(golden / 'tiny_sd' / 'model'), arrays(golden / 'tiny_sd' / 'expected.npz')


@pytest.fixture(scope='module')
def ddpm(golden: Path):
    return load(golden / 'tiny_ddpm' / 'model'), arrays(golden / 'tiny_ddpm' / 'expected.npz')


@cache
def load(path: Path, **options: Any) -> diffusion.Prior:
    return diffusion.load(path, **options)


# 1. The reference's numbers.


def test_text_equals_the_reference(sd):
    prior, expected = sd
    tokens = prior.tokenize(PROMPTS)
    assert tokens.dtype == np.int32
    np.testing.assert_array_equal(tokens, expected['token_ids'])
    near(prior.encode(PROMPTS), expected['text_hidden'], 'text')


def test_latent_eps_equals_the_reference(sd):
    prior, expected = sd
    inputs = last(expected['latents']), expected['timesteps'], expected['text_hidden']
    actual = jax.jit(prior.pure.eps)(prior.frozen, *inputs)
    near(actual, last(expected['unet_eps']), 'eps')
    assert actual.dtype == jnp.float32
    assert (prior.shape, prior.divisor, prior.factor) == ((8, 8, 4), 2, 2)


def test_decoder_equals_the_reference(sd):
    prior, expected = sd
    images = jax.jit(prior.pure.decode)(prior.frozen, last(expected['latents']))
    near(images, np.clip(last(expected['vae_decoded']) / 2 + 0.5, 0, 1), 'images')


def test_encoder_equals_the_reference(golden, sd):
    _, expected = sd
    module, params = folder.load_vae(golden / 'tiny_sd' / 'model' / 'vae')
    encode = jax.jit(lambda p, x: module.apply({'params': p}, x, method='encode'))
    mean, log_variance = encode(params, last(expected['images']))
    moments = last(expected['vae_moments'])
    near(mean, moments[..., :4], 'mean')
    near(log_variance, moments[..., 4:], 'log variance')


def test_pixel_eps_equals_the_reference(ddpm):
    prior, expected = ddpm
    actual = jax.jit(prior.pure.eps)(prior.frozen, last(expected['x']), expected['t'], None)
    near(actual, last(expected['eps']), 'eps')
    assert (prior.shape, prior.divisor, prior.factor) == ((16, 16, 3), 2, 1)
    assert prior.tokenize is None and set(prior.frozen) == {'unet'}


# 2. Options.


@cache
def made(kind: str = 'pixel', remat: bool = False, dtype: Any = jnp.float32, **changes: Any):
    """A tiny U-Net, or two that differ in options alone, with the same drawn parameters."""
    config = tiny(DDPM if kind == 'pixel' else SD1, **dict(changes))
    module = UNet(unet.from_config(config), dtype, remat)
    rng = np.random.default_rng(0)
    inputs = (rng.standard_normal((2, 4, 4, config['in_channels'])).astype(np.float32),
              np.array([3, 700]))  # fmt: skip
    if kind != 'pixel':
        inputs += (rng.standard_normal((2, 5, 6)).astype(np.float32),)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    leaves, tree = jax.tree.flatten(shapes)
    draws = [0.3 * rng.standard_normal(leaf.shape).astype(np.float32) for leaf in leaves]
    return module, tree.unflatten(draws), inputs


@cache
def program(kind: str = 'pixel', **options: Any) -> Any:
    return jax.jit(made(kind, **options)[0].apply)


def recomputed(kind: str, remat: bool) -> int:
    """The blocks of a program that are recomputed."""
    module, params, inputs = made(kind, remat)
    program = jax.make_jaxpr(module.apply)(params, *inputs)
    return sum(each.primitive.name.startswith('remat') for each in program.eqns)


@pytest.mark.slow
def test_every_block_can_be_recomputed():
    """8 residual ones, and attention in the middle and, in a latent model, in the finer level."""
    assert [recomputed(kind, False) for kind in ('pixel', 'latent')] == [0, 0]
    assert [recomputed(kind, True) for kind in ('pixel', 'latent')] == [9, 12]


@pytest.mark.slow
def test_recomputing_changes_no_gradient():
    """Of one level with attention; the whole is held to the reference, recomputed."""
    config = DDPM | dict(block_out_channels=[8], norm_num_groups=4, layers_per_block=1,
                         down_block_types=['AttnDownBlock2D'],
                         up_block_types=['AttnUpBlock2D'])  # fmt: skip
    x, t = np.random.default_rng(0).standard_normal((1, 4, 4, 3)).astype(np.float32), np.array([9])
    modules = [UNet(unet.from_config(config), remat=remat) for remat in (False, True)]
    shapes = jax.eval_shape(modules[0].init, jax.random.key(0), x, t)
    params = jax.tree.map(lambda leaf: np.linspace(-1, 1, leaf.size).reshape(leaf.shape), shapes)

    def gradient(module: UNet) -> np.ndarray:
        loss = jax.jit(jax.grad(lambda x, p: jnp.sum(jnp.square(module.apply(p, x, t)))))
        return np.asarray(loss(x, params))

    stored = gradient(modules[0])
    assert np.abs(stored).max() > 0
    near(gradient(modules[1]), stored, 'gradient', 1e-5)


def test_heads_of_every_level():
    assert unet.from_config(SD1).heads == (8,) * 4
    assert unet.from_config(SD2).heads == (5, 10, 20, 20)
    assert unet.from_config(DDPM).heads == (1,) * 4
    assert unet.from_config(DDPM | {'attention_head_dim': 64}).heads == (2, 4, 4, 4)


@pytest.mark.parametrize('heads', [1, 3])
def test_attention_by_hand(heads):
    """Every head looks at its own slice of the channels."""
    rng = np.random.default_rng(0)
    x, context = rng.standard_normal((2, 4, 6)), rng.standard_normal((2, 5, 3))
    weights = {name: rng.standard_normal((6 if name in ('to_q', 'to_out_0') else 3, 6))
               for name in ('to_q', 'to_k', 'to_v', 'to_out_0')}  # fmt: skip
    query, key, value = x @ weights['to_q'], context @ weights['to_k'], context @ weights['to_v']
    mixed = []
    for part in np.split(np.arange(6), heads):
        scores = np.exp(query[..., part] @ key[..., part].mT / np.sqrt(6 / heads))
        mixed.append(scores / scores.sum(-1, keepdims=True) @ value[..., part])
    expected = np.concatenate(mixed, -1) @ weights['to_out_0'] + 0.5
    params = {name: {'kernel': weight.astype(np.float32)} for name, weight in weights.items()}
    params['to_out_0']['bias'] = np.full(6, 0.5, np.float32)
    inputs = (each.astype(np.float32) for each in (x, context))
    near(unet.Attention(heads).apply({'params': params}, *inputs), expected, 'attention', 1e-5)


def test_linear_projections_are_the_same_numbers():
    rng = np.random.default_rng(0)
    x, text = (rng.standard_normal(shape).astype(np.float32) for shape in ((1, 2, 2, 8), (1, 3, 6)))
    by = [unet.Transformer(unet.from_config(tiny(SD1, use_linear_projection=linear)), 2)
          for linear in (False, True)]  # fmt: skip
    params = jax.jit(by[0].init)(jax.random.key(0), x, text)['params']
    expected = jax.jit(by[0].apply)({'params': params}, x, text)
    for name in ('proj_in', 'proj_out'):
        params[name]['kernel'] = params[name]['kernel'][0, 0]
    near(jax.jit(by[1].apply)({'params': params}, x, text), np.asarray(expected), 'map', 1e-5)


def test_text_and_time_matter():
    _, params, (x, t, text) = made('latent')
    run = program('latent')
    whole = np.asarray(run(params, x, t, text))
    assert np.abs(whole - run(params, x, t, text[::-1].copy())).max() > 1e-3
    assert np.abs(whole - run(params, x, t[::-1].copy(), text)).max() > 1e-3
    np.testing.assert_allclose(run(params, x[::-1].copy(), t[::-1].copy(), text[::-1].copy()),
                               whole[::-1], rtol=1e-3, atol=1e-4)  # fmt: skip


def test_half_precision_computes_in_half_precision():
    with jax.numpy_dtype_promotion('standard'):  # JAX's attention and Flax's norms rely on it
        module, params, inputs = made('latent', dtype=jnp.bfloat16)
        actual = program('latent', dtype=jnp.bfloat16)(params, *inputs)
        text = str(jax.make_jaxpr(module.apply)(params, *inputs))
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))
    exact = np.asarray(program('latent')(params, *inputs))
    assert actual.dtype == jnp.float32
    assert 1e-4 < np.abs(actual - exact).max() / np.abs(exact).max() < 0.1
    convolutions = [line for line in text.splitlines() if 'conv_general_dilated[' in line]
    assert convolutions and all('bf16[' in line for line in convolutions)


def test_sinusoids():
    actual = np.asarray(unet.sinusoids(jnp.array([0, 7]), 4, False, 1))
    np.testing.assert_allclose(actual[0], [0, 0, 1, 1])
    expected = [np.sin(7), np.sin(7e-4), np.cos(7), np.cos(7e-4)]
    np.testing.assert_allclose(actual[1], expected, rtol=1e-5)
    flipped = np.asarray(unet.sinusoids(jnp.array([7]), 4, True, 0))[0]
    expected = [np.cos(7), np.cos(0.07), np.sin(7), np.sin(0.07)]
    np.testing.assert_allclose(flipped, expected, rtol=1e-5)


def test_text_encoder_is_causal_and_knows_both_activations():
    config = CLIP_L | dict(hidden_size=8, intermediate_size=16, num_attention_heads=2,
                           num_hidden_layers=1, vocab_size=20,
                           max_position_embeddings=6)  # fmt: skip
    tokens = np.array([[1, 2, 3, 4, 5, 6]])
    outputs = {}
    for name in ('quick_gelu', 'gelu'):
        module = CLIPText(clip_text.from_config(config | {'hidden_act': name}))
        run = jax.jit(module.apply)
        params = jax.jit(module.init)(jax.random.key(0), tokens)
        # Drawn large, for the two activations to differ.
        params = jax.tree.map(
            lambda x: x + 0.5 * jnp.sin(jnp.arange(x.size)).reshape(x.shape), params
        )
        outputs[name] = run(params, tokens)
        later = run(params, tokens + (np.arange(6) > 3)[None])
        np.testing.assert_allclose(later[:, :4], outputs[name][:, :4], atol=1e-5)
        assert np.abs(later - outputs[name])[:, 4:].max() > 1e-3
    assert np.abs(outputs['gelu'] - outputs['quick_gelu']).max() > 1e-4
    assert float(clip_text.gelu(jnp.float32(1))) == pytest.approx(0.8413447, abs=1e-6)
    assert float(clip_text.quick_gelu(jnp.float32(1))) == pytest.approx(0.8457958, abs=1e-6)


# 3. The published models.

# Parameters and arrays of the published files, and some of their names and shapes.
SIZES: dict[str, tuple[Any, dict, int, int, dict[str, tuple[int, ...]]]] = {
    'sd15_unet': (UNet, SD1, 859_520_964, 686, {
        'conv_in.weight': (320, 4, 3, 3),
        'time_embedding.linear_1.weight': (1280, 320),
        'down_blocks.0.attentions.0.proj_in.weight': (320, 320, 1, 1),
        'down_blocks.0.downsamplers.0.conv.weight': (320, 320, 3, 3),
        'down_blocks.1.resnets.0.conv_shortcut.weight': (640, 320, 1, 1),
        'down_blocks.2.attentions.1.transformer_blocks.0.attn2.to_k.weight': (1280, 768),
        'mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj.weight': (10240, 1280),
        'mid_block.attentions.0.transformer_blocks.0.ff.net.2.bias': (1280,),
        'up_blocks.1.attentions.2.transformer_blocks.0.attn1.to_out.0.bias': (1280,),
        'up_blocks.1.resnets.2.conv_shortcut.weight': (1280, 1920, 1, 1),
        'up_blocks.2.upsamplers.0.conv.bias': (640,),
        'up_blocks.3.resnets.0.conv1.weight': (320, 960, 3, 3),
        'up_blocks.3.resnets.2.time_emb_proj.weight': (320, 1280),
        'conv_norm_out.weight': (320,),
        'conv_out.weight': (4, 320, 3, 3),
    }),
    'sd21_unet': (UNet, SD2, 865_910_724, 686, {
        'down_blocks.0.attentions.0.proj_in.weight': (320, 320),
        'down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v.weight': (640, 1024),
        'up_blocks.3.attentions.2.proj_out.weight': (320, 320),
    }),
    'sd_vae': (AutoencoderKL, VAE, 83_653_863, 248, {
        'encoder.conv_in.weight': (128, 3, 3, 3),
        'encoder.down_blocks.2.resnets.0.conv_shortcut.weight': (512, 256, 1, 1),
        'encoder.mid_block.attentions.0.to_out.0.weight': (512, 512),
        'encoder.conv_out.weight': (8, 512, 3, 3),
        'quant_conv.weight': (8, 8, 1, 1),
        'post_quant_conv.bias': (4,),
        'decoder.up_blocks.2.resnets.0.conv1.weight': (256, 512, 3, 3),
        'decoder.up_blocks.3.resnets.2.conv2.bias': (128,),
        'decoder.conv_out.weight': (3, 128, 3, 3),
    }),
    'clip_l_text': (CLIPText, CLIP_L, 123_060_480, 196, {
        'text_model.embeddings.token_embedding.weight': (49408, 768),
        'text_model.embeddings.position_embedding.weight': (77, 768),
        'text_model.encoder.layers.11.self_attn.out_proj.weight': (768, 768),
        'text_model.encoder.layers.0.mlp.fc1.weight': (3072, 768),
        'text_model.encoder.layers.0.layer_norm2.bias': (768,),
        'text_model.final_layer_norm.weight': (768,),
    }),
    'ddpm_cifar10_32': (UNet, DDPM, 35_746_307, 328, {
        'down_blocks.1.attentions.1.group_norm.weight': (256,),
        'down_blocks.1.attentions.0.to_q.bias': (256,),
        'down_blocks.2.downsamplers.0.conv.weight': (256, 256, 3, 3),
        'up_blocks.2.attentions.2.to_out.0.weight': (256, 256),
        'up_blocks.3.resnets.2.conv_shortcut.weight': (128, 256, 1, 1),
        'mid_block.attentions.0.to_v.weight': (256, 256),
        'time_embedding.linear_2.weight': (512, 512),
        'conv_out.bias': (3,),
    }),
}  # fmt: skip


@pytest.mark.parametrize('name', SIZES)
def test_published_sizes_and_names(name):
    make, config, parameters, arrays, sample = SIZES[name]
    architecture: Any = {UNet: unet, AutoencoderKL: vae, CLIPText: clip_text}[make]
    slots = folder.plan(make(architecture.from_config(config)))
    shapes = {key: slot.shape for key, slot in slots.items()}
    assert sum(map(math.prod, shapes.values())) == parameters
    assert {key: shapes.get(key) for key in sample} == sample
    assert len(shapes) == arrays


# 4. Resizing.


@pytest.mark.parametrize('sizes', [((16, 16), 32), ((32, 24), (7, 24)), ((5, 9), (10, 3))], ids=str)
def test_resizing_equals_pytorch(sizes):
    torch = pytest.importorskip('torch')
    source, target = sizes
    images = np.random.default_rng(0).standard_normal((2, *source, 3)).astype(np.float32)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), target, mode='bicubic',
        align_corners=False, antialias=False,
    ).numpy()  # fmt: skip
    found = diffusion.resize_bicubic(images, target, antialias=False)
    near(found, last(expected), 'images', 1e-5)


@pytest.mark.parametrize('sizes', [(64, 8), (40, 24), (16, 16), (8, 20)])
def test_resizing_equals_pillow(sizes):
    """Of one channel of floats, which Pillow resizes without rounding."""
    from PIL import Image

    source, target = sizes
    images = np.random.default_rng(0).random((2, source, source, 1)).astype(np.float32)
    to, how = (target, target), Image.Resampling.BICUBIC
    expected = [np.asarray(Image.fromarray(image[..., 0]).resize(to, how)) for image in images]
    found = diffusion.resize_bicubic(images, target)[..., 0]
    np.testing.assert_allclose(found, np.stack(expected), atol=1e-5)


def test_resizing_to_the_same_size_changes_nothing():
    images = np.random.default_rng(0).random((1, 4, 4, 3)).astype(np.float32)
    np.testing.assert_array_equal(diffusion.resize_bicubic(images, 4), images)
    near(
        diffusion.resize_bicubic(np.ones((1, 8, 8, 3)), (3, 5)), np.ones((1, 3, 5, 3)), 'ones', 1e-6
    )


# 5. Mistakes.


def test_pixel_prior_refuses_what_does_not_fit(ddpm):
    prior, _ = ddpm
    x, t = np.zeros((2, 16, 16, 3), np.float32), np.zeros(2, np.int32)
    for says, wrong in {
        r'x is \[2, 3, 16, 16\]: expected \[B, h, w, 3\]': (x.transpose(0, 3, 1, 2), t, None),
        'x is 16 by 15: expected sides that are multiples of 2': (x[:, :, :15], t, None),
        r't is \[\]: expected one timestep per image, \[2\]': (x, np.int32(3), None),
        'sees no text': (x, t, np.zeros((2, 77, 8), np.float32)),
    }.items():
        with pytest.raises(DiffusionError, match=says):
            prior.eps(*wrong)
    with pytest.raises(DiffusionError, match=r'z is \[16, 16, 3\]'):
        prior.decode(x[0])
    with pytest.raises(DiffusionError, match='no text encoder'):
        prior.encode(['a photo'])


def test_pixel_prior_decodes_by_rescaling(ddpm):
    z = np.array([-3, -1, 0, 0.5, 1, 2], np.float32).reshape(1, 1, 2, 3)
    images = np.asarray(ddpm[0].decode(z)).ravel()
    np.testing.assert_array_equal(images, [0, 0, 0.5, 0.75, 1, 1])


def test_latent_prior_refuses_what_does_not_fit(sd):
    prior, _ = sd
    x, t = np.zeros((2, 8, 8, 4), np.float32), np.zeros(2, np.int32)
    for says, wrong in {
        r'x is \[2, 8, 8, 3\]': (x[..., :3], t, None),
        'cond is None: expected text states': (x, t, None),
        r'cond is \[1, 77, 32\]: .*one text per image': (x, t, np.zeros((1, 77, 32))),
        r'cond is \[2, 77, 8\]: expected text states \[2, 77, 32\]': (x, t, np.zeros((2, 77, 8))),
    }.items():
        with pytest.raises(DiffusionError, match=says):
            prior.eps(*wrong)
    for prompts in ('a photo', [], None, 3, ['a photo', 7]):
        with pytest.raises(DiffusionError, match='expected a list of texts'):
            prior.encode(prompts)


def refused(architecture: Any, config: dict, says: str, **changes: Any) -> None:
    with pytest.raises(DiffusionError, match=says):
        architecture.from_config(config | changes, 'here/config.json')


def test_unet_configurations_refused():
    check = functools.partial(refused, unet, SD1)
    check(
        says="here/config.json is of a 'Transformer2DModel': expected",
        _class_name='Transformer2DModel',
    )
    check(says='CrossAttnDownBlock2D, DownBlock2D, not SimpleCrossAttnDownBlock2D',
          down_block_types=['SimpleCrossAttnDownBlock2D'] * 4)  # fmt: skip
    check(says='expected 4', up_block_types=['UpBlock2D'])
    check(says='addition_embed_type=.text_time', addition_embed_type='text_time')
    check(says='class_embed_type=.timestep', class_embed_type='timestep')
    check(says='an_option_to_come=True', an_option_to_come=True)
    check(says='cross_attention_dim=0', cross_attention_dim=0)
    check(says="no 'block_out_channels'", block_out_channels=None)
    check(says='block_out_channels=320', block_out_channels=320)
    check(says='divide into the groups', block_out_channels=[320, 640, 1280, 1290])
    check(says='does not divide', attention_head_dim=[5, 10, 20])
    check(says='does not divide', attention_head_dim=7)
    check(says='downsample_padding=2', downsample_padding=2)
    check(says='layers_per_block=.2, 2', layers_per_block=[2, 2, 2, 2])
    refused(unet, DDPM, 'resnet_time_scale_shift', resnet_time_scale_shift='scale_shift')
    refused(
        unet, DDPM, 'AttnUpBlock2D, UpBlock2D, not SkipUp', up_block_types=['SkipUpBlock2D'] * 4
    )
    # What changes nothing is no reason to refuse.
    unet.from_config(SD1 | {'an_option_to_come': None, 'dropout': 0.1, '_name': 'x'})


def test_other_configurations_refused():
    refused(vae, VAE, "'VQModel': expected AutoencoderKL", _class_name='VQModel')
    refused(vae, VAE, 'times DownEncoderBlock2D', down_block_types=['DownEncoderBlock2D'])
    refused(vae, VAE, 'shift_factor=0.1', shift_factor=0.1)
    refused(vae, VAE, 'norm_num_groups=48', norm_num_groups=48)
    refused(
        clip_text,
        CLIP_L,
        'CLIPTextModelWithProjection',
        architectures=['CLIPTextModelWithProjection'],
    )
    refused(clip_text, CLIP_L, "'relu': expected quick_gelu or gelu", hidden_act='relu')
    refused(clip_text, CLIP_L, 'heads that divide', num_attention_heads=7)
    refused(clip_text, CLIP_L, "no 'vocab_size'", vocab_size=None)
