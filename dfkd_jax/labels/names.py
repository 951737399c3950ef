"""Names of classes, and the sentences that text encoders see."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from dfkd_jax.errors import LabelError

DATA = Path(__file__).parent


def class_names(dataset: str) -> tuple[str, ...]:
    """WordNet's words for each class of ImageNet or Tiny-ImageNet, all synonyms, by label.

    Labels are in the order of the WordNet ids.  () for any other data set.  Two classes are called
    'crane' and nothing else; the first is 'crane bird' here.
    """
    if dataset == 'tiny_imagenet':
        words = _wordnet()
        return tuple(words[wnid] for wnid in (DATA / 'tiny_imagenet_wnids.txt').read_text().split())
    return tuple(_wordnet().values()) if dataset in ('imagenet', 'imagenet2012') else ()


def _wordnet() -> dict[str, str]:
    """WordNet ids of ImageNet's 1000 classes, in order, and their words."""
    lines = (DATA / 'imagenet_classes.txt').read_text().splitlines()
    return {wnid: words for wnid, _, words in (line.partition('\t') for line in lines)}


def _spelled_out(dataset: str, names: Sequence[str]) -> list[str]:
    """Names with WordNet's words in full, for a text encoder.

    ImageNet's classes are stored as 'n01443537' or, by `python -m dfkd_jax.data prepare`, as
    'goldfish' or 'crane (n03126707)'.  All become the same text.
    """
    words = {name.split(',')[0]: name for name in class_names(dataset)} | _wordnet()
    ids = [re.search(r'\bn\d{8}\b', name) for name in names]
    return [words.get(wnid[0] if wnid else name, name) for wnid, name in zip(ids, names)]


def sentences(prompt: str, dataset: str, names: Sequence[str], num_classes: int) -> list[str]:
    """The prompt with each class's name in place of '{}'.

    names: as the data set has them; (): the shipped ones.
    Raises LabelError unless there are as many names as classes.
    """
    words = _spelled_out(dataset, names or class_names(dataset))
    if len(words) != num_classes:
        raise LabelError(
            f'the data set {dataset!r} has {len(words)} class names and '
            f'config.data.num_classes={num_classes}: expected one name per class. '
            "Name the classes, or set config.labels.text='index' or config.labels.source='onehot' "
            "(of a diffusion model: a config.prior.prompt without '{}'), which need no names."
        )
    return [sentence(prompt, word) for word in words]


def sentence(prompt: str, name: str) -> str:
    """The prompt with one name, whose underscores and hyphens become spaces."""
    return prompt.replace('{}', re.sub('[_-]', ' ', name))
