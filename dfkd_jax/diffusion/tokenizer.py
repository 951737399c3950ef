"""CLIP's byte-pair encoding (Radford et al. 2021), from the files of a tokenizer's folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dfkd_jax.diffusion.folder import read_json
from dfkd_jax.errors import DiffusionError

# Contractions, words, single digits, and runs of anything else but blanks.
WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
START, END = '<|startoftext|>', '<|endoftext|>'

Tokenize = Callable[[Sequence[str]], np.ndarray]


def load(folder: str | Path, length: int = 77, vocabulary: int | None = None) -> Tokenize:
    """A function from a list of texts to their tokens, int32 [B, length].

    A text is lower-cased, gets a start and an end token, and is padded to `length` with the
    folder's padding token.  A longer text is cut and keeps its end token.

    Args:
      folder: with vocab.json, merges.txt and tokenizer_config.json.
      length: of every text, in tokens.
      vocabulary: the size of the text encoder's table, which no token may exceed.

    Raises:
      DiffusionError: for a folder that is incomplete, damaged or of another tokenizer; from the
        function, for anything but a list of texts.
    """
    try:
        import tokenizers  # noqa: F401
    except ImportError as error:
        raise DiffusionError(
            'prompts need the package tokenizers, which is not installed: run '
            "`pip install 'dfkd_jax[diffusion]'`."
        ) from error
    folder = Path(folder)
    vocab, special = _vocabulary(folder, vocabulary)
    tokenizer = _byte_pairs(folder, vocab, special['unk_token'])
    _add_special_tokens(tokenizer, vocab, special)
    tokenizer.enable_truncation(length)
    padding = special['pad_token']
    tokenizer.enable_padding(length=length, pad_id=vocab[padding], pad_token=padding)

    def tokenize(prompts: Sequence[str]) -> np.ndarray:
        _check(prompts)
        return np.array([text.ids for text in tokenizer.encode_batch(list(prompts))], np.int32)

    return tokenize


def _vocabulary(folder: Path, size: int | None) -> tuple[dict[str, int], dict[str, str]]:
    """The number of each token, below `size`; and the special tokens by their roles."""
    config = read_json(folder / 'tokenizer_config.json')
    kind = config.get('tokenizer_class', 'CLIPTokenizer')
    if kind not in ('CLIPTokenizer', 'CLIPTokenizerFast'):
        raise DiffusionError(f'{folder} is of a {kind}: expected CLIPTokenizer.')
    path = folder / 'vocab.json'
    vocab, special = read_json(path), _special(folder, config)
    absent = sorted({token for token in special.values() if token not in vocab})
    if absent:
        raise DiffusionError(
            f'{path} has no {" and no ".join(absent)}, the special tokens of its '
            'tokenizer_config.json: the two are of different models.'
        )
    if not all(type(number) is int and number >= 0 for number in vocab.values()):
        raise DiffusionError(f'{path} has tokens without a number: copy it again.')
    if size is not None and max(vocab.values()) >= size:
        raise DiffusionError(
            f'{path} has tokens up to {max(vocab.values())}, the text encoder only {size}: the two '
            'are of different models.'
        )
    return vocab, special


def _byte_pairs(folder: Path, vocab: dict[str, int], unknown: str) -> Any:
    """The tokenizer without special tokens."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    merges = _merges(folder / 'merges.txt')
    try:
        bpe = models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=False,
                         continuing_subword_prefix='', end_of_word_suffix='</w>')  # fmt: skip
    except Exception as error:  # tokenizers raises its own type
        raise DiffusionError(
            f'the merges and the vocabulary in {folder} do not fit ({error}): copy both again.'
        ) from error
    tokenizer: Any = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r'\s+'), ' '), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORDS), behavior='removed', invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])  # fmt: skip
    return tokenizer


def _add_special_tokens(tokenizer: Any, vocab: dict[str, int], special: dict[str, str]) -> None:
    """Makes tokens special, and begins and ends every text with its own."""
    from tokenizers import AddedToken, processors

    # In Stable Diffusion 2 the padding token is '!', which then no longer is an exclamation mark.
    tokens = dict.fromkeys(special.values())  # each once, in order
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in tokens])
    start, end = special['bos_token'], special['eos_token']
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f'{start}:0 $A:0 {end}:0', special_tokens=[(t, vocab[t]) for t in (start, end)]
    )


def _check(prompts: Any) -> None:
    """Raises DiffusionError for anything but a list of texts."""
    if not isinstance(prompts, list | tuple) or not prompts:
        raise DiffusionError(
            f'the prompts are {prompts!r}: expected a list of texts, such as '
            "['a realistic photo', '']."
        )
    wrong = [prompt for prompt in prompts if not isinstance(prompt, str)]
    if wrong:
        raise DiffusionError(f'the prompt {wrong[0]!r} is not a text: expected a list of texts.')


def _special(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """The special tokens by their roles.

    Two files name them.  special_tokens_map.json overrides tokenizer_config.json (in Stable
    Diffusion 2, it alone says that the padding is '!'), unless the latter is of the newer form,
    which holds all added tokens.
    """
    named = {'bos_token': START, 'eos_token': END, 'unk_token': END, 'pad_token': END}
    sources = [config]
    path = folder / 'special_tokens_map.json'
    if 'added_tokens_decoder' not in config and path.is_file():
        sources.append(read_json(path))
    for source in sources:
        for role in named:
            token = source.get(role)
            token = token.get('content') if isinstance(token, dict) else token
            if token is not None:
                named[role] = str(token)
    return named


def _merges(path: Path) -> list[tuple[str, str]]:
    """The pairs of tokens to merge, in order."""
    try:
        lines = path.read_text(encoding='utf-8').splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DiffusionError(f'{path} cannot be read ({error}): copy it again.') from error
    pairs = [tuple(line.split()) for line in lines if line.strip()]
    # The first line may name a version.  Others may start with '#', which is a token too.
    pairs = pairs[1:] if lines and lines[0].startswith('#version') else pairs
    wrong = [' '.join(pair) for pair in pairs if len(pair) != 2]
    if wrong:
        raise DiffusionError(f'{path} has the line {wrong[0]!r}: expected two tokens a line.')
    return [(first, second) for first, second in pairs]
