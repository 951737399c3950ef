"""CAE-DFKD (https://arxiv.org/abs/2504.21478).

On record, the accuracy of the student at the last step:

    digits           98.89 %, one seed, 229 s of a shared CPU core (experiments/digits)
    fashion_mnist    86.55 ± 0.72 %, three seeds, 552 s of two CPU cores (experiments/fashion_mnist)
"""

from ml_collections import ConfigDict

from dfkd_jax.configs.methods import nayer

LOOP = 'alternating'
FLAGS = ('untrained',)


def published(config: ConfigDict) -> None:
    """NAYER's setting with diffused embeddings in place of the noisy layer.

    The paper's numbers could not be read: four sources are its choice, all else is ours.
    """
    nayer.published(config)
    config.generator = dict(
        model='dcgan_generator',
        width=64,
        life=0,  # rounds from one new generator to the next; 0: one for the whole run
        reset_adam=True,  # at every batch
        lr=4e-3,
        beta1=0.5,
        beta2=0.999,
    )
    config.noise = dict(
        sources=('normal', 'uniform', 'laplace', 'sign'),
        magnitudes=(20.0,) * 4,  # in standard deviations of an embedding over classes
        fresh=False,  # at every step of the generator; else once a batch
        subspaces=False,  # each source in dimensions of its own; else all in all
    )
    config.loss.update(contrast=0.1, contrast_temperature=0.1, contrast_of='sources')
    config.loss.update(diversity=0.0, diversity_temperature=0.1)
    config.synthesis.mixup = 0.0


def small(config: ConfigDict) -> None:
    """As NAYER's."""
    nayer.small(config)


def adapt(config: ConfigDict, flags: set[str]) -> None:
    """NAYER's schedules."""
    nayer.schedule(config, flags)
    match config.data.name:
        case 'digits' | 'fashion_mnist':
            small(config)
        case 'cifar10' if 'small' in flags:
            small(config)
            config.generator.update(width=32, lr=1e-2)
        case 'imagenet' | 'domainnet':
            config.generator.model = 'dcgan_deep_generator'
