"""Ports a PyTorch checkpoint to a model folder, which a run can take as its teacher.

python -m dfkd_jax.port --model=resnet34 --num_classes=10 --source=t.pth --output=teachers/r34
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from dfkd_jax.command import arguments
from dfkd_jax.port import weight_files
from dfkd_jax.port.torch_flax import classifier_sizes, read, to_torch
from dfkd_jax.storage import files, model_folder


def main(argv: Sequence[str] | None = None, prog: str = 'python -m dfkd_jax.port') -> None:
    """Ports a checkpoint and prints what it did; a mistake of the user ends it with a message."""
    parser = arguments.make('port', prog)
    args = parser.parse_args(argv)
    try:
        sizes = {name: int(number) for name, number in (size.split('=') for size in args.size)}
    except ValueError:
        parser.error(f'--size takes NAME=NUMBER, not {" ".join(args.size)}')
    try:
        source, output = files.expanded(args.source), files.expanded(args.output)
        print(port(args.model, args.num_classes, source, output, **sizes))
    except (OSError, ValueError) as error:
        parser.exit(1, f'error: {error}\n')


def port(model: str, num_classes: int, source: Path, output: Path, **sizes: int) -> str:
    """Writes the model folder `output` and returns the message for the user.

    Raises ValueError where the weights do not fit, or `output` holds something else.
    """
    ported = read(model, source, num_classes, **sizes)
    variables = ported.variables
    card: dict = {'num_classes': num_classes, **sizes}
    if ported.mean:
        card |= {'mean': list(ported.mean), 'std': list(ported.std)}
    if not model.endswith('_generator'):
        card['num_classes'], card['channels'] = classifier_sizes(model, variables)
    card['source'] = source.name
    card['sha256'] = weight_files.digest(source)

    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        if not _same(output, variables, {'model': model, **card}):
            raise ValueError(f'{output} exists and holds something else: give another --output, or '
                             'remove it if you do not need it')  # fmt: skip
        return f'{output} already holds these weights: nothing to do'
    model_folder.save_model(output, model, variables, **card)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(variables['params']))
    arrays = len(to_torch(model, variables))
    notes = ''.join(f'{note}\n' for note in ported.notes)
    return (f'{notes}{model}: {parameters:,} parameters, {arrays} arrays from {source} '
            f'(sha256 {card["sha256"][:16]}...)\nwrote {output}')  # fmt: skip


def _same(output: Path, variables: dict, card: dict) -> bool:
    """Whether a model folder holds these weights, with these entries in its card."""
    try:
        old_card, old = model_folder.load_model(output)
    except (OSError, ValueError):
        return False
    if {key: old_card.get(key) for key in card} != card:
        return False
    arrays, old_arrays = model_folder.flatten(variables), model_folder.flatten(old)
    return arrays.keys() == old_arrays.keys() and all(
        np.array_equal(array, old_arrays[path]) for path, array in arrays.items()
    )


if __name__ == '__main__':
    main()
