"""Pictures from a plain folder, without classes: what a diffusion prior is trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dfkd_jax.errors import DataError

SUFFIXES = ('.png', '.jpg', '.jpeg')


def read_folder(folder: Path, size: int, channels: int) -> np.ndarray:
    """All PNG and JPEG images under a folder, by path: [N, size, size, channels] uint8.

    What is transparent is black; of an image that is not square, the middle is taken.
    channels: 1 (grey) or 3.

    Raises DataError where there are none, or one cannot be read.
    """
    from PIL import Image

    files = [path for path in folder.rglob('*') if path.suffix.lower() in SUFFIXES]
    if not files:
        raise DataError(
            f'there are no {", ".join(SUFFIXES)} images in {folder}: check config.data.folder.'
        )
    images = np.empty((len(files), size, size, channels), np.uint8)
    for path, out in zip(sorted(files), images):
        try:
            with Image.open(path) as file:
                image = file.convert('RGBA')
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f'{path} cannot be read ({error}): copy it again.') from error
        image = Image.alpha_composite(Image.new('RGBA', image.size, (0, 0, 0, 255)), image)
        image = image.convert('L' if channels == 1 else 'RGB')
        if image.size != (size, size):
            (width, height), side = image.size, min(image.size)
            left, top = (width - side) / 2, (height - side) / 2
            box = (left, top, left + side, top + side)
            image = image.resize((size, size), Image.Resampling.BOX, box)
        out[:] = np.asarray(image).reshape(out.shape)
    return images
