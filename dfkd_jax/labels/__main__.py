"""Makes a table of embeddings of class names: ``python -m dfkd_jax.labels --output=FILE.npz``."""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

import numpy as np

from dfkd_jax.data.sets import DATASETS
from dfkd_jax.errors import LabelError
from dfkd_jax.labels import encoders
from dfkd_jax.labels.names import sentence
from dfkd_jax.labels.table import PROMPT, SHIPPED_FOR, SHIPPED_INDICES, check_prompt
from dfkd_jax.storage import files


def make_table(prompt: str, folder: str | Path) -> tuple[list[str], np.ndarray]:
    """The texts of the listed data sets' class names and of 100 indices; embeddings [n, E]."""
    words = [name for dataset in SHIPPED_FOR for name in DATASETS[dataset].class_names]
    words += [f'class {label}' for label in range(SHIPPED_INDICES)]
    texts = list(dict.fromkeys(sentence(prompt, word) for word in words))  # each once, in order
    return texts, encoders.encode_minilm(texts, folder)


def main(argv: list[str] | None = None) -> None:
    """Makes a file of embeddings of class names, whole or not at all."""
    parser = argparse.ArgumentParser(prog='python -m dfkd_jax.labels', description=main.__doc__)
    parser.add_argument('--output', required=True, help='FILE.npz, for config.labels.path')
    parser.add_argument('--prompt', default=PROMPT, help='default: %(default)s')
    parser.add_argument('--encoder', help='its folder; default: the installed package')
    args = parser.parse_args(argv)
    try:
        check_prompt(args.prompt)
        texts, table = make_table(args.prompt, args.encoder or encoders.installed())
    except (LabelError, OSError) as error:
        sys.exit(f'error: {error}')
    file = io.BytesIO()
    # Half precision changes a number by 0.05 % at most, and halves the file.
    np.savez_compressed(file, text=np.array(texts), embedding=table.astype(np.float16))
    files.write_bytes(files.expanded(args.output), file.getvalue())
    print(f'{len(texts)} embeddings are in {args.output}')


if __name__ == '__main__':
    main()
