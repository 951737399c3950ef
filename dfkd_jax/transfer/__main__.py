"""What a network's features are worth on other images: a linear probe, or fine-tuning.

    python -m dfkd_jax.transfer --student=FOLDER --dataset=NAME --protocol=probe|finetune
        [--untrained] [--seed=0] [--output=FILE.json] [--data_dir=DIR] ...

FOLDER is a run's workdir, whose student is taken, or any model folder: a teacher, or a student that
`dfkd_jax.teach` trained.  NAME is a data set that `dfkd_jax.data` reads.  --untrained keeps the
architecture and draws new weights, the control of every table.

Images come at the network's size and in its channels (colours become luma for a grey network), and
are normalised with the constants of the images that the network was trained on: those of the other
set would shift the scale of everything behind the frozen first layer.
"""

from __future__ import annotations

# Arguments, not flags: as in `data` and `port`, there is no config here.
import argparse
import sys
from collections.abc import Sequence

from dfkd_jax import build, data
from dfkd_jax.transfer.classification import PROTOCOLS, Recipe, run

# --- The command ---------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the arguments, measures, and says what came out; mistakes end it in one line."""
    parser = argparse.ArgumentParser(prog='python -m dfkd_jax.transfer', description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    network_arguments(parser)
    add = parser.add_argument
    add('--dataset', required=True, metavar='NAME', help='the images to measure on')
    add('--protocol', required=True, metavar='|'.join(PROTOCOLS))
    add('--resize', default='resize', metavar='|'.join(data.RESIZE), help="to the network's size")
    add('--pooled', action='store_true', help='probe: pooled maps of all stages too')
    for name in ('epochs', 'batch_size', 'lr', 'weight_decay', 'crop_padding'):
        default = Recipe._field_defaults[name]
        kind = float if isinstance(default, float) else int
        add(f'--{name}', type=kind, default=default, help=f'finetune (default {default})')
    args = vars(parser.parse_args(argv))
    recipe = Recipe(**{name: args.pop(name) for name in Recipe._fields if name in args})
    try:
        result = run(**args, recipe=recipe)
    except build.EXPECTED_ERRORS as error:
        sys.exit(f'error: {error}')
    weights = 'untrained' if args['untrained'] else f'trained on {result["source_dataset"]}'
    print(
        f'{result["protocol"]} of {result["model"]} ({weights}): {result["accuracy"]:.2f} % of the '
        f'{result["test_size"]} test images of {result["dataset"]}, {result["seconds"]:.0f} s'
    )


def network_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of every measurement: whose weights, which draws, and where to."""
    add = parser.add_argument
    add('--student', required=True, metavar='FOLDER', help="a run's workdir, or a model folder")
    add('--untrained', action='store_true', help='the control: the architecture, new weights')
    add('--seed', type=int, default=0, help='of new weights, of batches, of a validation part')
    add('--output', metavar='FILE.json', help='where to write the result')
    add('--data_dir', help='where data sets are kept; else $TFDS_DATA_DIR')
    add('--source_dataset', metavar='NAME', help='of a ported network: what it was trained on')
    add('--image_size', type=int, metavar='PIXELS', help='of a ported network')


if __name__ == '__main__':
    main()
