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

from dfkd_jax.command import arguments
from dfkd_jax.transfer import ending
from dfkd_jax.transfer.segmentation import run


def main(
    argv: Sequence[str] | None = None, prog: str = 'python -m dfkd_jax.transfer_dense'
) -> None:
    """Measures, and prints the mean IoU; a mistake of the user ends it with one line."""
    parser = arguments.parser(arguments.transfer_dense, prog, str(__doc__).partition('\n')[0])
    result, network = ending.measure(run, parser, argv)
    print(
        f'segmentation by {network}: mIoU {result["miou"]:.2f} % of {result["test_size"]} scenes '
        f'of {result["num_classes"]} classes, {result["seconds"]:.0f} s'
    )


if __name__ == '__main__':
    main()
