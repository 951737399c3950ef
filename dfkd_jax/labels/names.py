"""The words of a class: its name, and the sentence around it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from dfkd_jax.errors import LabelError

DATA = Path(__file__).parent


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
    return [sentence(prompt, word) for word in words]


def sentence(prompt: str, name: str) -> str:
    return prompt.replace('{}', re.sub('[_-]', ' ', name))
