"""Images to train small diffusion priors on; they share no class with the teachers' data.

    apt-get download openclipart-png && dpkg-deb -x openclipart-png_*.deb CLIPART
    python experiments/prior_data.py clipart --source=CLIPART --output=FOLDER
    python experiments/prior_data.py strokes --output=FOLDER

clipart: 32x32 grey on black, the object 28 pixels high or wide (Debian's openclipart-png, public
    domain).  People, clothing, shoes and bags are left out, by folder and by name, so no class of
    Fashion-MNIST is among them.  Each picture once, and at most 150 of one folder.
strokes: 16x16 grey on black, 4,000 random curves of one to three strokes, drawn by this file.  It
    knows nothing of digits (though now and then a curve looks like a 1 or a 0).

FOLDER gets *.png and images.json, which describes them.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SEED = 0
SIZE, OBJECT = 32, 28  # pixels, of clip art; Fashion-MNIST is 28, padded to 32
LARGEST = 1200  # pixels a side: the few larger ones are not decoded
MOST = 150  # pictures of one folder
STROKES, STROKE_SIZE = 4000, 16

# Folders of near-duplicates, folders without objects, and folders that show people.
FOLDERS = (
    'people',
    'unsorted',
    'special',
    'recreation/sports',
    'recreation/games/cards',
    'shapes/stars',
    'signs_and_symbols/flags',
    'signs_and_symbols/led',
)
# Left out: paths with a word that begins or ends with one of these (English and Italian) ...
CLOTHING = (
    'shirt pullover sweater jersey blouse dress skirt trouser coat jacket sandal sneaker shoe boot '
    'slipper bag backpack purse pocket luggage suitcase handbag briefcase wallet stocking clothes '
    'clothing glove helmet vestit scarp borsa borsett camicia pantalon giacca cappell stival zaino '
    'valigi guant'
).split()
# ... or that is one of these, or its plural.
WORDS = (
    'hat cap top tophat pants jeans sock suit vest bra uniform tie scarf belt heel sole calza '
    'man men woman women boy girl person people human user lady king queen prince princess santa '
    'angel dancer foot skate player judo yoga karate skier runner baby babe child kid donna uomo '
    'ragazza ragazzo buddy avatar body toilet chef toque protection hanger wardrobe mannequin '
    'sewing laundry iron basket cesto'
).split()


def clipart(source: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Names and pictures [32, 32] uint8 of the unpacked package; a name tells the folder."""
    root = source / 'usr' / 'share' / 'openclipart' / 'png'
    if not root.is_dir():
        raise ValueError(f'there is no {root}: unpack the package with dpkg-deb -x')
    files = sorted(path for path in root.rglob('*.png') if path.is_file())
    files = [path for path in files if not path.is_symlink() and kept(path.relative_to(root))]
    order = np.random.default_rng(SEED).permutation(len(files))  # picks from large folders
    seen, of_folder, chosen = set(), Counter(), {}
    for path in (files[i] for i in order):
        folder = path.parent
        if of_folder[folder] == MOST:
            continue
        picture = placed(path)
        if picture is not None and picture.tobytes() not in seen:
            seen.add(picture.tobytes())
            of_folder[folder] += 1
            chosen['-'.join(path.relative_to(root).with_suffix('').parts)] = picture
    yield from sorted(chosen.items())


def kept(path: Path) -> bool:
    """Whether a picture shows none of people, clothing, shoes and bags."""
    if path.as_posix().startswith(tuple(f'{folder}/' for folder in FOLDERS)):
        return False
    for word in re.findall('[a-z]+', path.as_posix().lower()):
        if word.startswith(tuple(CLOTHING)) or word.removesuffix('s').endswith(tuple(CLOTHING)):
            return False
        if word in WORDS or word.removesuffix('s') in WORDS:
            return False
    return True


def placed(path: Path) -> np.ndarray | None:
    """A picture in grey on black, cut to the object; None if that leaves almost nothing."""
    try:
        with Image.open(path) as image:
            if max(image.size) > LARGEST:
                return None
            pixels = np.asarray(image.convert('RGBA'), np.float32) / 255
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    alpha = pixels[..., 3]
    grey = pixels[..., :3] @ np.float32([0.299, 0.587, 0.114])
    # The picture or its negative: the one with the darker frame.  If both frames are dark, the
    # brighter one, so that black lines on a transparent ground become white on black.
    both = (alpha * grey, alpha * (1 - grey))
    frames = [np.mean(np.concatenate([x[0], x[-1], x[:, 0], x[:, -1]])) for x in both]
    if abs(frames[0] - frames[1]) > 0.2:
        grey = both[int(frames[1] < frames[0])]
    else:
        grey = max(both, key=np.sum)
    rows, columns = (np.flatnonzero((grey > 0.1).any(axis)) for axis in (1, 0))
    if len(rows) < 8 or len(columns) < 8:
        return None
    grey = grey[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = (max(1, round(side * OBJECT / max(grey.shape))) for side in grey.shape)
    small = Image.fromarray((255 * grey).round().astype(np.uint8))
    small = np.asarray(small.resize((width, height), Image.Resampling.BOX))
    if np.mean(small) < 16 or min(height, width) < 6:
        return None
    out = np.zeros((SIZE, SIZE), np.uint8)
    top, left = (SIZE - height) // 2, (SIZE - width) // 2
    out[top : top + height, left : left + width] = small
    return out


def strokes() -> Iterator[tuple[str, np.ndarray]]:
    """Random smooth curves as high or as wide as the picture, [16, 16] uint8."""
    rng, side = np.random.default_rng(SEED), STROKE_SIZE * 8
    for i in range(STROKES):
        curves = [curve(rng) for _ in range(rng.choice([1, 2, 3], p=[0.4, 0.4, 0.2]))]
        points = np.concatenate(curves)
        low, high = points.min(0), points.max(0)
        radius = rng.uniform(0.04, 0.09)
        points = 0.5 + (points - (low + high) / 2) * (1 - 2 * radius) / (high - low).max()
        canvas = Image.new('L', (side, side))
        draw = ImageDraw.Draw(canvas)
        for x, y in points:
            draw.ellipse([side * (x - radius), side * (y - radius),
                          side * (x + radius), side * (y + radius)], 255)  # fmt: skip
        small = canvas.resize((STROKE_SIZE // 2,) * 2, Image.Resampling.BOX)  # softens the edges
        small = np.asarray(small.resize((STROKE_SIZE,) * 2, Image.Resampling.BILINEAR), np.float32)
        yield f'{i:05d}', (small * (255 / small.max())).round().astype(np.uint8)


def curve(rng: np.random.Generator) -> np.ndarray:
    """Points [200, 2] in [0, 1] of a Bezier curve of three to five random corners."""
    corners = rng.uniform(0.1, 0.9, (rng.integers(3, 6), 2))
    if rng.random() < 0.2:
        corners[-1] = corners[0]  # closed
    time = np.linspace(0, 1, 200)[:, None, None]
    while corners.shape[-2] > 1:  # de Casteljau
        corners = (1 - time) * corners[..., :-1, :] + time * corners[..., 1:, :]
    return corners[:, 0]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument('name', choices=('clipart', 'strokes'))
    parser.add_argument('--source', type=Path, help='clipart: the unpacked package')
    parser.add_argument('--output', type=Path, required=True, help='the folder to make')
    args = parser.parse_args()
    if args.output.exists():
        sys.exit(f'error: {args.output} is there already: remove it, or give another --output.')
    if args.name == 'clipart' and args.source is None:
        sys.exit('error: clipart needs --source, the folder the package was unpacked to.')
    try:
        pictures = dict(clipart(args.source) if args.name == 'clipart' else strokes())
    except ValueError as error:
        sys.exit(f'error: {error}.')
    args.output.mkdir(parents=True)
    for name, pixels in pictures.items():
        Image.fromarray(pixels).save(args.output / f'{name}.png')
    facts = {'data': args.name, 'images': len(pictures), 'made_by': 'experiments/prior_data.py'}
    (args.output / 'images.json').write_text(json.dumps(facts, indent=2) + '\n')
    print(f'{len(pictures)} images in {args.output}')


if __name__ == '__main__':
    main()
