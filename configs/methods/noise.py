"""KD with noise images: the floor of every comparison.  Ours, and no published method.

On record, the accuracy of the student at the last step:

    fashion_mnist    12.61 ± 0.87 %, three seeds, cut to 100 s of one CPU core
                     (experiments/compare/resnet8)
"""

from ml_collections import ConfigDict

from dfkd_jax.configs import common

LOOP = 'alternating'
FLAGS = ()


def published(config: ConfigDict) -> None:
    """As long and at the rates that CMI's and Fast-DFKD's benchmark has.  Ours."""
    config.student.update(lr=0.1, final_lr=2e-4, momentum=0.9, weight_decay=1e-4)
    config.loss = dict(temperature=4.0)
    config.synthesis = dict(
        batch_size=256,  # of synthesis, of which there is none
        student_batch_size=256,
    )
    config.phases = (common.phase(rounds=200, g_steps=0, s_steps=400),)


def small(config: ConfigDict) -> None:
    """Small batches, for minutes of a CPU."""
    config.synthesis.update(batch_size=128, student_batch_size=128)
    config.phases = (common.phase(rounds=100, g_steps=0, s_steps=20),)


def adapt(config: ConfigDict, flags: set[str]) -> None:
    """The small setting for the small data sets."""
    match config.data.name:
        case 'digits':
            small(config)
        case 'cifar10' if 'small' in flags:
            small(config)
            config.phases[0].rounds = 1000
        case 'fashion_mnist':
            small(config)
            config.phases[0].rounds = 400
