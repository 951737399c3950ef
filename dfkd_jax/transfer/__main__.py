"""What a network's features are worth on other images: a linear probe, or fine-tuning.

    python -m dfkd_jax.transfer --student=FOLDER --dataset=NAME --protocol=probe|finetune
        [--untrained] [--seed=0] [--output=FILE.json] [--data_dir=DIR] ...

FOLDER is a run's workdir, whose student is taken, or a model folder: of a teacher, or of a student
that `dfkd_jax.teach` trained.  NAME is a data set that `dfkd_jax.data` reads.  --untrained keeps
the architecture and draws new weights, the control in every table.

Images are brought to the network's size and channels (colours become luma for a grey network).
They are normalised with the constants of the images that the network was trained on: those of the
other data set would shift the scale of everything behind the frozen first layer.
"""

from __future__ import annotations

from collections.abc import Sequence

from dfkd_jax.command import arguments
from dfkd_jax.transfer import ending
from dfkd_jax.transfer.classification import run


def main(argv: Sequence[str] | None = None, prog: str = 'python -m dfkd_jax.transfer') -> None:
    """Measures, and prints the accuracy; a mistake of the user ends it with one line."""
    result, network = ending.measure(run, arguments.make('transfer', prog), argv)
    print(
        f'{result["protocol"]} of {network}: {result["accuracy"]:.2f} % of the '
        f'{result["test_size"]} test images of {result["dataset"]}, {result["seconds"]:.0f} s'
    )


if __name__ == '__main__':
    main()
