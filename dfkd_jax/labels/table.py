"""Tables of label embeddings, [C, E]: stored ones, encoded ones and one-hot codes.

A stored table is a .npy file, or a .npz file with one array, or with one named after the data set:
rows [C, E] in the order of the labels.  Or it is a .npz file of arrays `text` [n] and `embedding`
[n, E], as the shipped table is.  Its embeddings belong to texts, so a name or a prompt that it
lacks is an error, and never another class's embedding.  ``python -m dfkd_jax.labels
--output=FILE.npz`` makes such a file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np

from dfkd_jax.errors import LabelError
from dfkd_jax.labels import encoders, names
from dfkd_jax.storage import files, safe_read

SOURCES = ('table', 'minilm', 'clip', 'onehot')
TEXTS = ('names', 'index')
PROMPT = 'a image of {}'  # of the shipped table; the grammar is that of NAYER's code
SHIPPED = Path(__file__).with_name('label_tables.npz')
SHIPPED_INDICES = 100
SHIPPED_FOR = ('cifar10', 'cifar100', 'fashion_mnist', 'digits')  # and 'index', up to 100 classes


class Settings(Protocol):
    """The group `labels` of a config.

    Attributes:
      source: where embeddings come from:
        'table': stored ones, the shipped table (MiniLM) or a file;
        'minilm': the sentence encoder all-MiniLM-L6-v2 (Wang et al. 2020; Reimers & Gurevych 2019);
        'clip': a CLIP text encoder (Radford et al. 2021), as in NAYER's code;
        'onehot': orthogonal codes, which know nothing of the names.
      path: of the table, or the folder of the encoder; None: the shipped table, the installed
        encoder.
      text: 'names' of the classes, or 'index': "class 7".
      prompt: the sentence around a name, with {} in its place.
      standardise: whether to standardise each dimension over the classes; see `standardise`.
    """

    source: str
    path: str | None
    text: str
    prompt: str
    standardise: bool


def load(
    settings: Settings, dataset: str, class_names: Sequence[str], num_classes: int
) -> np.ndarray:
    """The embeddings of a data set's classes, float32 [C, E].

    Args:
      settings: which embeddings.
      dataset: its name, which selects an array of a file and the shipped class names.
      class_names: in the order of the labels, as the data set has them.
      num_classes: C.

    Raises:
      LabelError: for names, a table, a package or a setting that is missing or does not fit.
    """
    _expect('source', settings.source, SOURCES)
    _expect('text', settings.text, TEXTS)
    check_prompt(settings.prompt)

    def texts() -> list[str]:
        if settings.text == 'index':
            return [names.sentence(settings.prompt, f'class {i}') for i in range(num_classes)]
        return names.sentences(settings.prompt, dataset, class_names, num_classes)

    if settings.source == 'onehot':
        table = np.eye(num_classes)
    elif settings.source == 'minilm':
        table = encoders.encode_minilm(texts(), settings.path or encoders.installed())
    elif settings.source == 'clip':
        table = encoders.encode_clip(texts(), settings.path)
    else:
        table = _from_file(files.expanded(settings.path or SHIPPED), dataset, texts)
    _check_table(table, settings, num_classes)
    table = table.astype(np.float32)
    return standardise(table) if settings.standardise else table


def settled(
    settings: Settings, dataset: str, class_names: Sequence[str], num_classes: int
) -> Settings:
    """The settings as `load` can follow them where no class names are known.

    Embeddings of names become those of numbers ("class 7") or, where the shipped table has not so
    many, orthogonal codes.  Ours: the papers know their classes.  The same settings where names are
    known or not asked for, and for a table of your own.
    """
    given = settings.source == 'table' and settings.path is not None
    named = class_names or names.class_names(dataset)
    if named or given or settings.text != 'names' or settings.source == 'onehot':
        return settings
    changed = {name: getattr(settings, name) for name in Settings.__annotations__}
    changed['text'] = 'index'
    if settings.source == 'table' and num_classes > SHIPPED_INDICES:
        changed['source'] = 'onehot'
    return SimpleNamespace(**changed)


def standardise(table: np.ndarray) -> np.ndarray:
    """A table [C, E] whose dimensions have zero mean and unit (biased) std over the classes.

    Embeddings of one prompt with different names share a large component: their mean cosine is 0.3
    to 0.9, and largest for indices.  A generator would hardly see the class beside it, and noise of
    a given size would mean something else for every encoder.  A dimension without spread becomes 0.
    """
    exact = table.astype(np.float64)
    spread = np.ptp(exact, axis=0)
    # MiniLM has three dead dimensions, of 1e-8 and less: scaling them would magnify rounding.
    alive = spread > 1e-4 * spread.max()
    scale = np.where(alive, exact.std(0), 1.0)
    return np.where(alive, (exact - exact.mean(0)) / scale, 0.0).astype(np.float32)


def _from_file(path: Path, dataset: str, texts: Callable[[], list[str]]) -> np.ndarray:
    """The table in a .npy or .npz file, whatever its shape.

    texts: makes the texts of the classes; a function, since only a file of texts needs them.
    """
    try:
        safe_read.check_archive(path)
        with open(path, 'rb') as file:  # given a path, np.load leaves it open after an error
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return loaded
            arrays = dict(loaded)
    except FileNotFoundError:
        raise LabelError(f'there is no table {path}: check config.labels.path.') from None
    except Exception as error:  # NumPy and zipfile raise errors of every kind on damaged files
        raise LabelError(
            f'{path} cannot be read as .npy or .npz ({error}): make it with np.save or np.savez, '
            'from numbers only.'
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
    """The embedding of each text, [n, E].  Raises LabelError where one is not stored."""
    missing = [text for text in texts if text not in stored]
    if missing:
        raise LabelError(
            f'{path} has no embedding of {missing[0]!r} (and {len(missing) - 1} more of the '
            f'{len(texts)} classes), but for example of {next(iter(stored), "nothing")!r}. The '
            f'shipped table has the prompt {PROMPT!r} and the names of {", ".join(SHIPPED_FOR)}, '
            "or class 0 to 99. Encode others with config.labels.source='minilm', or set "
            "config.labels.text='index' or config.labels.source='onehot'."
        )
    return np.stack([stored[text] for text in texts])


def _check_table(table: np.ndarray, settings: Settings, num_classes: int) -> None:
    """Raises LabelError unless a table is finite numbers [num_classes, width]."""
    where = f'the table of config.labels (source={settings.source!r}, path={settings.path!r})'
    expected = (
        f'expected numbers [{num_classes}, width], one row per class, in the order of labels.'
    )
    if table.dtype.kind not in 'fiu':
        raise LabelError(f'{where} holds {table.dtype}: {expected}')
    if table.ndim != 2 or len(table) != num_classes or not table.size:
        raise LabelError(f'{where} has the shape {list(table.shape)}: {expected}')
    if not np.isfinite(table).all():
        raise LabelError(f'{where} has numbers that are not finite (nan or infinite): {expected}')


def check_prompt(prompt: str) -> None:
    """Raises LabelError unless a prompt has one place for a name."""
    if prompt.count('{}') != 1:
        raise LabelError(
            f'the prompt {prompt!r} has {{}} {prompt.count("{}")} times: expected it once, in the '
            f'place of the name, as in {PROMPT!r}.'
        )


def _expect(field: str, value: Any, known: Sequence[str]) -> None:
    if value not in known:
        raise LabelError(f'config.labels.{field}={value!r}: expected one of {", ".join(known)}.')
