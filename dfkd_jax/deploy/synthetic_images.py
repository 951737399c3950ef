"""Synthetic images of a finished run: of its bank, or drawn from what its last state holds.

No real image is read: these calibrate an INT8 student, measure whether it agrees, and are what an
audit compares real images with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from dfkd_jax import build, data
from dfkd_jax.contract import Frozen, State
from dfkd_jax.data import synthetic
from dfkd_jax.deploy.student import Student
from dfkd_jax.errors import DeployError
from dfkd_jax.loops import alternating
from dfkd_jax.methods.shared.image_bank import Bank
from dfkd_jax.storage import files
from dfkd_jax.storage.checkpoints import Checkpoints


def draw(student: Student, number: int, seed: int) -> np.ndarray:
    """Images of the student's run, [number, H, W, channels] uint8; the same for the same seed.

    A run that keeps its images in memory draws new ones from its generator or, where its method
    has none, takes them from its bank.

    Raises DeployError for a network without synthetic images.
    """
    run, config = student.run, student.config
    if run is None or config is None or 'loop' not in config:
        raise DeployError(
            f'{student.folder} is not the student of a run, and INT8 is calibrated on the '
            'synthetic images of one: give --student=RUN, the --workdir of the run.'
        )
    if config.loop == 'alternating':
        return _drawn(config, *_restored(run, config), number, seed)
    if config.loop == 'offline':
        bank = files.expanded(config.synthesis.bank or run / 'bank')
        return _of_bank(bank, student.card.image_size, number, seed)
    raise DeployError(
        f'the run in {run} distilled on real images ({config.method}) and made none of its own, '
        'and INT8 is calibrated on synthetic images: export it without --int8.'
    )


def teacher(run: Path, config: Any) -> dict[str, Any]:
    """The variables of a run's teacher.  Raises what `build.load_network` does."""
    path = config.teacher.checkpoint or run / 'teacher'
    return build.load_network(path, config.teacher.model, config.data)


def banked(student: Student, number: int, seed: int) -> np.ndarray:
    """Different images of the bank of the student's run, as `draw` returns them; all if fewer.

    Where the run keeps no bank they are those of `draw`.  Raises DeployError as `draw` does.
    """
    run, config = student.run, student.config
    if run is None or config is None or config.get('loop') != 'alternating':
        return draw(student, number, seed)
    built, frozen, state = _restored(run, config)
    nodes = jax.tree.leaves(state.extra, is_leaf=lambda node: isinstance(node, Bank))
    banks = [node for node in nodes if isinstance(node, Bank)]
    if not banks:
        return _drawn(config, built, frozen, state, number, seed)
    images = np.asarray(banks[0].image)[: int(banks[0].written)]
    return images[np.random.default_rng(seed).permutation(len(images))[:number]]


def _drawn(
    config: Any, built: build.Run, frozen: Frozen, state: State, number: int, seed: int
) -> np.ndarray:
    """Images from the last state of an alternating run."""
    state, sample = built.plan.replicate(state), built.plan.call(built.whole.sample)
    key = jax.random.fold_in(jax.random.key(config.seed), seed)
    images: list[np.ndarray] = []
    while sum(map(len, images)) < number:
        batch = sample(frozen, state, jax.random.fold_in(key, len(images)))
        shown = data.denormalise(batch.image, built.facts.mean, built.facts.std)
        images.append(np.asarray(np.round(np.asarray(shown) * 255), np.uint8))
    return np.concatenate(images)[:number]


def _restored(run: Path, config: Any) -> tuple[build.Run, Frozen, State]:
    """An alternating run: built for one device, with what it reads and its last state."""
    if not (run / 'checkpoints').is_dir():
        raise DeployError(
            f'{run} has no checkpoints/, and with them no generator: INT8 is calibrated on the '
            "run's synthetic images. Put the folder back, or export without --int8."
        )
    config = config.copy_and_resolve_references()
    config.parallel = 'jit'  # whatever devices the run had
    built = build.build(config)
    table = run / alternating.TABLE
    extra = np.load(table, allow_pickle=False) if table.is_file() else built.extra
    frozen = built.plan.replicate(Frozen(teacher=teacher(run, config), extra=extra))
    like = jax.eval_shape(built.whole.init, frozen, jax.random.key(0))
    with Checkpoints(run / 'checkpoints') as store:
        restored = store.restore(like)
    if restored is None:
        raise DeployError(f'{run / "checkpoints"} is empty: export without --int8.')
    return built, frozen, restored.state


def _of_bank(bank: Path, size: int, number: int, seed: int) -> np.ndarray:
    """Images from a bank of files, as many of each batch, at the side of the network's images."""
    from PIL import Image

    batches = synthetic.count(bank)
    if not batches:
        raise DeployError(
            f"{bank} has no synthetic images, on which INT8 is calibrated: put the run's bank "
            'back, or export without --int8.'
        )
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(batches)[:number]
    each = -(-number // len(chosen))
    images: list[np.ndarray] = []
    for batch in chosen.tolist():
        stored = synthetic.read(bank, batch)['image']
        images += list(stored[rng.permutation(len(stored))[:each]])
    if images[0].shape[0] != size:
        images = [
            np.asarray(
                Image.fromarray(image.squeeze()).resize((size, size), Image.Resampling.BILINEAR)
            ).reshape(size, size, -1)
            for image in images
        ]
    return np.stack(images[:number])
