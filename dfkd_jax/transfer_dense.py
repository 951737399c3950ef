"""What a network's maps are worth for semantic segmentation: a small FCN head, trained with it.

    python -m dfkd_jax.transfer_dense --student=FOLDER --scenes=FOLDER [--untrained] [--frozen]
        [--seed=0] [--output=FILE.json] ...

--student is as in `dfkd_jax.transfer`.  --scenes holds ``train`` and ``test``, each with
``images/NAME.*`` and ``masks/NAME.png`` of the same size: a class for each pixel, 0 the background,
255 where none is known.  ADE20K's and NYUv2's folders have this form, renamed.

The head is that of Long et al. (2015): class scores by a 1x1 convolution of the last map, enlarged
to the image; with --stages, of the maps before it too, summed.  Networks are convolutional, so
scenes may be larger than the images they were trained on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from dfkd_jax import build
from dfkd_jax.transfer import classification
from dfkd_jax.transfer.__main__ import network_arguments
from dfkd_jax.transfer.segmentation import run


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the arguments, measures, and says what came out; mistakes end it in one line."""
    parser = argparse.ArgumentParser(prog='python -m dfkd_jax.transfer_dense', description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    network_arguments(parser)
    add = parser.add_argument
    add('--scenes', required=True, metavar='FOLDER', help='train/ and test/, images/ and masks/')
    add('--size', type=int, default=64, help='pixels that scenes are brought to')
    add('--stages', type=int, default=3, help='how many maps the head sees, the last ones')
    add('--frozen', action='store_true', help='train the head alone')
    for name, default in (('epochs', 30), ('batch_size', 64), ('lr', 0.02), ('weight_decay', 5e-4)):
        add(f'--{name}', type=type(default), default=default, help=f'(default {default})')
    args = vars(parser.parse_args(argv))
    recipe = classification.Recipe(
        **{n: args.pop(n) for n in classification.Recipe._fields if n in args}
    )
    try:
        result = run(**args, recipe=recipe)
    except build.EXPECTED_ERRORS as error:
        sys.exit(f'error: {error}')
    weights = 'untrained' if args['untrained'] else f'trained on {result["source_dataset"]}'
    print(
        f'segmentation by {result["model"]} ({weights}): mIoU {result["miou"]:.2f} % of '
        f'{result["test_size"]} scenes of {result["num_classes"]} classes, '
        f'{result["seconds"]:.0f} s'
    )


if __name__ == '__main__':
    main()
