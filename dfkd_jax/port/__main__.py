"""Ports a PyTorch checkpoint to a model folder that runs take as their teacher.

python -m dfkd_jax.port --model=resnet34 --num_classes=10 --source=t.pth --output=teachers/r34
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from dfkd_jax.port.torch_flax import classifier_sizes, from_torch, to_torch
from dfkd_jax.storage import model_folder


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the flags, ports, writes, and says what it did; exits with a message if it cannot."""
    parser = argparse.ArgumentParser(prog='python -m dfkd_jax.port', description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    parser.add_argument('--model', required=True, help='a name of the model zoo, such as resnet34')
    parser.add_argument('--num_classes', type=int, default=10)
    parser.add_argument('--source', type=Path, required=True,
                        help='.pth, .pt, .safetensors or .npz')  # fmt: skip
    parser.add_argument('--output', type=Path, required=True, help='the model folder to make')
    parser.add_argument('--size', action='append', default=[], metavar='NAME=NUMBER',
                        help="again for each: channels, or a generator's sizes")  # fmt: skip
    args = parser.parse_args(argv)
    try:
        sizes = {name: int(number) for name, number in (size.split('=') for size in args.size)}
    except ValueError:
        parser.error(f'--size takes NAME=NUMBER, not {" ".join(args.size)}')
    try:
        print(port(args.model, args.num_classes, args.source, args.output, **sizes))
    except (OSError, ValueError) as error:
        parser.exit(1, f'error: {error}\n')


def port(model: str, num_classes: int, source: Path, output: Path, **sizes: int) -> str:
    """Writes the model folder `output` and returns what to tell the user.

    Raises ValueError where the weights do not fit or `output` holds something else.
    """
    variables = from_torch(model, source, num_classes, **sizes)
    facts: dict = {'num_classes': num_classes, **sizes}
    if not model.endswith('_generator'):
        facts['num_classes'], facts['channels'] = classifier_sizes(model, variables)
    facts['source'] = source.name
    facts['sha256'] = hashlib.sha256(source.read_bytes()).hexdigest()

    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        if not _same(output, variables, {'model': model, **facts}):
            raise ValueError(f'{output} exists and holds something else: give another --output, or '
                             'remove it if you do not need it')  # fmt: skip
        return f'{output} already holds these weights: nothing to do'
    model_folder.save_model(output, model, variables, **facts)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(variables['params']))
    arrays = len(to_torch(model, variables))
    return (f'{model}: {parameters:,} parameters, {arrays} arrays from {source} '
            f'(sha256 {facts["sha256"][:16]}...)\nwrote {output}')  # fmt: skip


def _same(output: Path, variables: dict, facts: dict) -> bool:
    """Whether a model folder holds these weights under these facts."""
    try:
        old_facts, old = model_folder.load_model(output)
    except (OSError, ValueError):
        return False
    if {key: old_facts.get(key) for key in facts} != facts:
        return False
    arrays, old_arrays = model_folder.flatten(variables), model_folder.flatten(old)
    return arrays.keys() == old_arrays.keys() and all(
        np.array_equal(array, old_arrays[path]) for path, array in arrays.items()
    )


if __name__ == '__main__':
    main()
