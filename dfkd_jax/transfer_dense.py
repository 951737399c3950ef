"""What a network's maps are worth for semantic segmentation: a small FCN head, trained with it.

    python -m dfkd_jax.transfer_dense --student=FOLDER --scenes=FOLDER [--untrained] [--frozen]
        [--seed=0] [--output=FILE.json] ...

--student is as in `dfkd_jax.transfer`.  --scenes holds ``train`` and ``test``, each with
``images/NAME.*`` and ``masks/NAME.png`` of the same size: a class for each pixel, 0 for the
background and 255 where it is unknown.  The folders of ADE20K and NYUv2 have this form, renamed.

The head is that of Long et al. (2015): class scores by a 1x1 convolution of the last map, enlarged
to the image.  With --stages, those of the maps before it are added.  Networks are convolutional, so
scenes may be larger than the images that they were trained on.
"""

from __future__ import annotations

from collections.abc import Sequence

from dfkd_jax.transfer import arguments
from dfkd_jax.transfer.segmentation import RECIPE, run

FIELDS = ('epochs', 'batch_size', 'lr', 'weight_decay')


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, and prints the mean IoU; a mistake of the user ends it with one line."""
    parser = arguments.make_parser('python -m dfkd_jax.transfer_dense', __doc__)
    add = parser.add_argument
    add('--scenes', required=True, metavar='FOLDER', help='train/ and test/, images/ and masks/')
    add('--size', type=int, default=64, help='pixels that scenes are resized to')
    add('--stages', type=int, default=3, help='how many maps the head sees, the last ones')
    add('--frozen', action='store_true', help='train the head alone')
    arguments.add_recipe(parser, RECIPE, FIELDS)
    result, network = arguments.measure(run, parser, argv)
    print(
        f'segmentation by {network}: mIoU {result["miou"]:.2f} % of {result["test_size"]} scenes '
        f'of {result["num_classes"]} classes, {result["seconds"]:.0f} s'
    )


if __name__ == '__main__':
    main()
