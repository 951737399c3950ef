"""Model folders: there and back bit for bit, any storage of the same weights, or one error."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from reference import identical
from safetensors.numpy import load_file, save_file

from dfkd_jax import diffusion
from dfkd_jax.diffusion import folder, tokenizer, unet
from dfkd_jax.diffusion.unet import UNet
from dfkd_jax.errors import DiffusionError

CONFIG = {
    '_class_name': 'UNet2DModel', 'attention_head_dim': None, 'block_out_channels': [8, 16],
    'down_block_types': ['DownBlock2D', 'AttnDownBlock2D'], 'downsample_padding': 0,
    'flip_sin_to_cos': False, 'freq_shift': 1, 'in_channels': 3, 'layers_per_block': 1,
    'norm_eps': 1e-6, 'norm_num_groups': 4, 'out_channels': 3, 'sample_size': 8,
    'up_block_types': ['AttnUpBlock2D', 'UpBlock2D'],
}  # fmt: skip
SCHEDULER = {'_class_name': 'DDIMScheduler', 'beta_schedule': 'linear', 'clip_sample': True}
FILE = 'diffusion_pytorch_model.safetensors'
QUERY = 'mid_block.attentions.0.to_q.weight'
LEGACY = {'to_q': 'query', 'to_k': 'key', 'to_v': 'value', 'to_out.0': 'proj_attn'}


def params() -> Any:
    """Parameters of CONFIG with no two elements alike."""
    slots = folder.plan(UNet(unet.from_config(CONFIG)))
    total, leaves = 0, {}
    for slot in slots.values():
        shape = tuple(slot.shape[i] for i in slot.axes)
        size = int(np.prod(shape))
        # Counting in bit patterns: from 0.5 on, and no two alike.
        numbers = np.arange(0x3F000000 + total, 0x3F000000 + total + size, dtype=np.int32)
        leaves[slot.path] = numbers.view(np.float32).reshape(shape)
        total += size
    return folder.traverse_util.unflatten_dict(leaves, sep='/')


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder of a pixel prior."""
    diffusion.save_unet(tmp_path / 'prior', CONFIG, params())
    return tmp_path / 'prior'


def rewrite(home: Path, change) -> None:
    """Changes the arrays of a folder's one file."""
    arrays = load_file(home / FILE)
    save_file({key: np.ascontiguousarray(x) for key, x in change(arrays).items()}, home / FILE)


def loaded(home: Path) -> Any:
    return diffusion.load_unet(home)[1]


# 1. There and back.


def test_round_trip_is_bit_identical(home: Path):
    module, there = diffusion.load_unet(home)
    identical(there, params())
    assert module.config == unet.from_config(CONFIG)
    assert json.loads((home / 'config.json').read_text()) == CONFIG
    assert sorted(path.name for path in home.iterdir()) == ['config.json', FILE]
    first = (home / FILE).read_bytes()
    diffusion.save_unet(home, CONFIG, there)
    assert (home / FILE).read_bytes() == first


def test_a_saved_folder_is_a_prior_with_its_schedule(tmp_path: Path):
    diffusion.save_unet(tmp_path, CONFIG, jax.tree.map(jnp.asarray, params()), SCHEDULER)
    prior = diffusion.load(tmp_path)
    identical(prior.frozen, {'unet': params()})
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(prior.frozen))
    assert prior.shape == (8, 8, 3) and prior.schedule.clip == 1.0
    linear = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    np.testing.assert_allclose(prior.schedule.alphas_cumprod, linear, rtol=1e-5)
    # As a pipeline has it, too.
    (tmp_path / 'whole' / 'scheduler').mkdir(parents=True)
    diffusion.save_unet(tmp_path / 'whole' / 'unet', CONFIG, params())
    shutil.copy(tmp_path / 'scheduler_config.json', tmp_path / 'whole' / 'scheduler')
    identical(diffusion.load(tmp_path / 'whole').frozen, prior.frozen)


def test_names_are_those_of_the_reference(golden: Path):
    """All of them, and the same bytes in every array, for the pixel U-Net."""
    source = golden / 'tiny_ddpm' / 'model'
    module, there = diffusion.load_unet(source)
    arrays, expected = folder.to_torch(module, there), load_file(source / FILE)
    assert arrays.keys() == expected.keys()
    assert all(arrays[key].tobytes() == expected[key].tobytes() for key in expected)


def test_what_does_not_fit_is_not_saved(tmp_path: Path):
    with pytest.raises(DiffusionError, match='does not divide'):
        diffusion.save_unet(tmp_path, CONFIG | {'attention_head_dim': 3}, params())
    with pytest.raises(DiffusionError, match='EulerDiscreteScheduler'):
        diffusion.save_unet(tmp_path, CONFIG, params(), {'_class_name': 'EulerDiscreteScheduler'})
    wrong = params()
    wrong['conv_in']['kernel'] = wrong['conv_in']['kernel'][..., 1:]
    wrong['conv_in']['extra'] = wrong['conv_out'].pop('bias')
    with pytest.raises(DiffusionError) as error:
        diffusion.save_unet(tmp_path, CONFIG, wrong)
    for line in ('missing (1): conv_out/bias', 'unexpected (1): conv_in/extra',
                 'mis-shaped (1): conv_in/kernel (3, 3, 3, 7), expected (3, 3, 3, 8)'):  # fmt: skip
        assert line in str(error.value)
    assert not list(tmp_path.iterdir())


# 2. Other ways to store the same weights.


@pytest.mark.parametrize('dtype', [np.float16, ml_dtypes.bfloat16, np.float64], ids=str)
def test_other_precisions(home: Path, dtype):
    rewrite(home, lambda arrays: {key: x.astype(dtype) for key, x in arrays.items()})
    expected = jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), params())
    identical(loaded(home), expected)


def shard(home: Path, variant: str = '') -> Path:
    """Splits a folder's file in two, with an index of them."""
    arrays, listed = load_file(home / FILE), {}
    (home / FILE).unlink()
    stem = f'diffusion_pytorch_model{variant and "." + variant}'
    for i in (1, 2):
        name = f'{stem}-0000{i}-of-00002.safetensors'
        part = dict(list(arrays.items())[i - 1 :: 2])
        save_file(part, home / name)
        listed |= dict.fromkeys(part, name)
    index = home / f'{FILE}.index{variant and "." + variant}.json'
    index.write_text(json.dumps({'metadata': {}, 'weight_map': listed}))
    return index


@pytest.mark.parametrize('variant', ['', 'fp16'])
def test_several_files(home: Path, variant: str):
    index = shard(home, variant)
    identical(loaded(home), params())
    second = index.with_name(sorted(path.name for path in home.glob('*00002-of*'))[0])
    second.unlink()
    with pytest.raises(DiffusionError, match=f'has no {second.name}, which .* lists'):
        loaded(home)


def test_an_array_of_two_files_is_an_error(home: Path):
    shard(home)
    one, two = sorted(home.glob('*-of-*.safetensors'))
    again = next(iter(load_file(one)))
    save_file(load_file(two) | {again: load_file(one)[again]}, two)
    with pytest.raises(DiffusionError, match=rf'given twice \(1\): {again}'):
        loaded(home)


def test_a_list_of_files_stays_in_its_folder(home: Path):
    shutil.copy(home / FILE, home.parent / 'other.safetensors')
    index = shard(home)
    index.write_text(json.dumps({'weight_map': {QUERY: '../other.safetensors'}}))
    with pytest.raises(DiffusionError, match=r'has no \.\./other.safetensors'):
        loaded(home)


def test_variants_count_where_there_is_nothing_else(home: Path):
    half = home / 'diffusion_pytorch_model.fp16.safetensors'
    shutil.copy(home / FILE, half)
    rewrite(home, lambda arrays: {key: x + 1 for key, x in arrays.items()})
    identical(loaded(home), jax.tree.map(lambda x: x + np.float32(1), params()))
    (home / FILE).rename(home / 'diffusion_pytorch_model.non_ema.safetensors')
    identical(loaded(home), params())
    half.rename(home / 'diffusion_pytorch_model.other.safetensors')
    with pytest.raises(DiffusionError, match='weights of non_ema, other, and none without'):
        loaded(home)


@pytest.mark.parametrize('convolutions', [False, True])
def test_legacy_names_of_attention(home: Path, convolutions: bool):
    def legacy(arrays):
        renamed = {}
        for key, x in arrays.items():
            if 'attentions' in key:
                if convolutions and x.ndim == 2:
                    x = x[:, :, None, None]
                for new, old in LEGACY.items():
                    key = key.replace(f'.{new}.', f'.{old}.')
            renamed[key] = x
        assert 'mid_block.attentions.0.proj_attn.bias' in renamed
        return renamed

    rewrite(home, legacy)
    identical(loaded(home), params())


def test_position_numbers_of_the_text_encoder_are_dropped(golden: Path, tmp_path: Path):
    home = shutil.copytree(golden / 'tiny_sd' / 'model' / 'text_encoder', tmp_path / 'text')
    expected = folder.load_text(home)[1]
    arrays = load_file(home / 'model.safetensors')
    (home / 'model.safetensors').chmod(0o644)
    numbers = np.arange(77)[None]
    save_file(arrays | {'text_model.embeddings.position_ids': numbers}, home / 'model.safetensors')
    identical(folder.load_text(home)[1], expected)


# 3. Mistakes, all of them at once.


def test_every_mistake_is_listed(home: Path):
    def damage(arrays):
        arrays['conv_in.weight'] = arrays['conv_in.weight'][:, :2]
        arrays['mid_block.attentions.0.query.weight'] = arrays[QUERY]
        arrays['extra.weight'] = arrays.pop('conv_out.bias')
        del arrays['time_embedding.linear_1.weight']
        arrays['conv_in.bias'] = arrays['conv_in.bias'].astype(np.int32)
        arrays['conv_norm_out.bias'] = arrays['conv_norm_out.bias'] * np.float32(np.inf)
        # Not of attention: nowhere else are 1x1 convolutions stored for linear layers.
        name = 'time_embedding.linear_2.weight'
        arrays[name] = arrays[name][:, :, None, None]
        return arrays

    rewrite(home, damage)
    with pytest.raises(DiffusionError) as error:
        loaded(home)
    for line in (
        'missing (2): conv_out.bias, time_embedding.linear_1.weight',
        'unexpected (1): extra.weight',
        'mis-shaped (2): conv_in.weight (8, 2, 3, 3), expected (8, 3, 3, 3), '
        'time_embedding.linear_2.weight (32, 32, 1, 1), expected (32, 32)',
        'given twice (1): mid_block.attentions.0',
        'not floating-point (1): conv_in.bias I32',
        'not finite (1): conv_norm_out.bias',
    ):
        assert line in str(error.value)


def test_another_architecture_is_refused_with_the_names(home: Path):
    changed = CONFIG | {'layers_per_block': 2}
    (home / 'config.json').write_text(json.dumps(changed))
    with pytest.raises(DiffusionError, match=r'missing .*down_blocks.0.resnets.1.conv1.weight'):
        diffusion.load(home)


@pytest.mark.parametrize('damage', ['cut', 'pointer', 'empty', 'gone', 'pickle', 'json', 'list'])
def test_damaged_folders(home: Path, damage: str):
    path, config = home / FILE, home / 'config.json'
    if damage == 'cut':
        path.write_bytes(path.read_bytes()[:-4])
    elif damage == 'pointer':
        path.write_text('version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n')
    elif damage == 'empty':
        path.write_bytes(b'')
    elif damage == 'gone':
        config.unlink()
    elif damage == 'pickle':
        path.rename(home / 'diffusion_pytorch_model.bin')
    else:
        config.write_text('{' if damage == 'json' else '[]')
    says = {'gone': 'there is no .*config.json', 'json': 'cannot be read as JSON',
            'pickle': r'there is diffusion_pytorch_model.bin.*as safetensors first',
            'list': 'holds a list'}.get(damage, 'cannot be read .*Copy it again')  # fmt: skip
    with pytest.raises(DiffusionError, match=says):
        diffusion.load(home)


# 4. Whole pipelines.


@pytest.fixture
def pipeline(golden: Path, tmp_path: Path) -> Path:
    """A copy of the tiny latent diffusion folder that may be changed."""
    pytest.importorskip('tokenizers', reason='pip install tokenizers')
    home = tmp_path / 'sd'
    for source in (golden / 'tiny_sd' / 'model').rglob('*'):
        if source.is_file():
            target = home / source.relative_to(golden / 'tiny_sd' / 'model')
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    return home


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_folders_of_other_kinds_are_refused(pipeline: Path):
    def check(says: str, path: Path = pipeline) -> None:
        with pytest.raises(DiffusionError, match=says):
            diffusion.load(path)

    check('there is no folder', pipeline / 'nowhere')
    check('UNet2DConditionModel alone: expected the folder above', pipeline / 'unet')
    check("'AutoencoderKL': expected UNet2DConditionModel", pipeline / 'vae')
    edit(pipeline / 'model_index.json', text_encoder_2=['transformers', 'CLIPTextModel'])
    check('lists text_encoder_2: expected a pipeline')
    edit(pipeline / 'model_index.json', text_encoder_2=[None, None])
    edit(pipeline / 'scheduler' / 'scheduler_config.json', _class_name='LCMScheduler')
    check("'LCMScheduler': expected DDPMScheduler")
    edit(pipeline / 'scheduler' / 'scheduler_config.json', _class_name='PNDMScheduler')
    edit(pipeline / 'text_encoder' / 'config.json', vocab_size=500)
    check(r'token_embedding.weight \(534, 32\), expected \(500, 32\)')
    edit(pipeline / 'text_encoder' / 'config.json', vocab_size=534)
    shutil.rmtree(pipeline / 'scheduler')
    check('there is no .*scheduler_config.json')


def test_the_parts_of_a_pipeline_must_fit(pipeline: Path):
    narrow = {'in_channels': 5, 'out_channels': 4}
    edit(pipeline / 'unet' / 'config.json', **narrow)
    path = pipeline / 'unet' / FILE
    arrays = load_file(path)
    arrays['conv_in.weight'] = np.zeros((32, 5, 3, 3), np.float32)
    save_file(arrays, path)
    with pytest.raises(DiffusionError, match='5 channels in and 4 out, the VAE 4 of latents'):
        diffusion.load(pipeline)


def test_a_pipeline_stored_in_half_precision(pipeline: Path):
    """Every network of it, under the name that such files have."""
    exact = diffusion.load(pipeline).frozen
    for part, stem in (('unet', FILE), ('vae', FILE), ('text_encoder', 'model.safetensors')):
        path = pipeline / part / stem
        arrays = {key: x.astype(np.float16) for key, x in load_file(path).items()}
        save_file(arrays, path.with_name(stem.replace('.safetensors', '.fp16.safetensors')))
        path.unlink()
    rounded = jax.tree.map(lambda x: np.asarray(x).astype(np.float16).astype(np.float32), exact)
    identical(jax.tree.map(np.asarray, diffusion.load(pipeline).frozen), rounded)


# 5. Tokens.


@pytest.fixture
def words(pipeline: Path) -> Path:
    return pipeline / 'tokenizer'


def test_long_prompts_are_cut_and_keep_their_end(words: Path):
    tokens = tokenizer.load(words)(['cat ' * 200, 'cat ' * 75, 'cat ' * 74])
    start, end = 532, 533
    assert (
        tokens.shape == (3, 77) and (tokens[:, 0] == start).all() and (tokens[:, -1] == end).all()
    )
    np.testing.assert_array_equal(tokens[0], tokens[1])
    assert tokens[0, -2] != end and tokens[2, -2] == end


def test_text_is_normalised_before_it_is_split(words: Path):
    tokenize = tokenizer.load(words)
    plain, other = tokenize(['a photo of a cat', '  A\tPhoto of\n\na   CAT '])
    np.testing.assert_array_equal(plain, other)
    vocab = json.loads((words / 'vocab.json').read_text())
    names = {number: token for token, number in vocab.items()}
    said = [names[number] for number in tokenize(["dog's 10 ships!?"])[0][:12]]
    assert said == ['<|startoftext|>', 'dog</w>', "'", 's</w>', '1</w>', '0</w>', 'shi', 'p',
                    's</w>', '!', '?</w>', '<|endoftext|>']  # fmt: skip
    # Bytes of what is not ASCII, each a token of its own.
    assert [names[number] for number in tokenize(['é'])[0][1:3]] == ['Ã', '©</w>']


def test_padding_is_what_the_folder_says(words: Path):
    def padding() -> list[int]:
        tokens = tokenizer.load(words)(['a cat'])[0]
        return sorted(set(tokens[5:].tolist()))

    path, other = words / 'tokenizer_config.json', words / 'special_tokens_map.json'
    assert padding() == [533]
    edit(path, pad_token='!')
    assert padding() == [0]
    edit(path, pad_token={'content': '!', 'lstrip': False})
    assert padding() == [0]
    # The older form, as of Stable Diffusion 2: the second file has the last word.
    config = json.loads(path.read_text()) | {'pad_token': '<|endoftext|>'}
    edit(other, pad_token='!')
    path.write_text(json.dumps(config))
    assert padding() == [533]
    del config['added_tokens_decoder']
    path.write_text(json.dumps(config))
    assert padding() == [0]


@pytest.mark.parametrize(
    'file, text, says',
    [
        ('merges.txt', '#version: 0.2\na n x\n', "line 'a n x': expected two tokens"),
        ('merges.txt', '#version: 0.2\nzz yy\n', 'do not fit'),
        ('merges.txt', None, 'merges.txt cannot be read'),
        ('vocab.json', '{"a": 0}', r'has no <\|endoftext\|> and no <\|startoftext\|>'),
        ('vocab.json', '{', 'cannot be read as JSON'),
        ('vocab.json', None, 'there is no .*vocab.json'),
        ('tokenizer_config.json', '{"tokenizer_class": "T5Tokenizer"}', 'expected CLIPTokenizer'),
    ],
)
def test_damaged_tokenizers(words: Path, file: str, text: str | None, says: str):
    (words / file).unlink()
    if text is not None:
        (words / file).write_text(text)
    with pytest.raises(DiffusionError, match=says):
        tokenizer.load(words)


def test_a_vocabulary_larger_than_the_encoder_is_refused(words: Path):
    with pytest.raises(DiffusionError, match='up to 533, the text encoder only 500'):
        tokenizer.load(words, 77, 500)
