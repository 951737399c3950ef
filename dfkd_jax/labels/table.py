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

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dfkd_jax.errors import LabelError
from dfkd_jax.labels import encoders, names
from dfkd_jax.storage import safe_read

SOURCES = ('table', 'minilm', 'clip', 'onehot')
TEXTS = ('names', 'index')
PROMPT = 'a image of {}'  # of the embeddings that ship
SHIPPED = Path(__file__).with_name('label_tables.npz')
SHIPPED_FOR = ('cifar10', 'cifar100', 'fashion_mnist', 'digits')  # and 'index', up to 100 classes


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
    check_prompt(settings.prompt)
    if settings.source == 'onehot':
        table = np.eye(num_classes)
    else:

        def texts() -> list[str]:
            return _texts(settings, dataset, class_names, num_classes)

        if settings.source == 'minilm':
            table = encoders.encode_minilm(texts(), settings.path or encoders.installed())
        elif settings.source == 'clip':
            table = encoders.encode_clip(texts(), settings.path)
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


def _texts(settings: Any, dataset: str, class_names: Sequence[str], num_classes: int) -> list[str]:
    if settings.text == 'index':
        return [names.sentence(settings.prompt, f'class {label}') for label in range(num_classes)]
    return names.sentences(settings.prompt, dataset, class_names, num_classes)


# 2. Stored tables.


def _from_file(path: Path, dataset: str, texts: Callable[[], list[str]]) -> np.ndarray:
    """The table of a .npy or .npz file, whatever its shape.

    texts: a function of nothing, since only a file of texts needs them.
    """
    try:
        safe_read.check_archive(path)
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


def check_prompt(prompt: str) -> None:
    if prompt.count('{}') != 1:
        raise LabelError(
            f'the prompt {prompt!r} has {{}} {prompt.count("{}")} times: expected it once, where '
            f'the name goes, as in {PROMPT!r}.'
        )


def _expect(field: str, value: Any, known: Sequence[str]) -> None:
    if value not in known:
        raise LabelError(f'config.labels.{field}={value!r}; expected one of {", ".join(known)}.')
