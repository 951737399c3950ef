"""CMI (https://arxiv.org/abs/2105.08584).

On record, the accuracy of the student at the last step:

    fashion_mnist    67.77 ± 3.60 %, three seeds, cut to 100 s of one CPU core
                     (experiments/compare/resnet8)
"""

from ml_collections import ConfigDict

from dfkd_jax.configs import common, common_benchmark

LOOP = 'alternating'
FLAGS = ('untrained',)


def published(config: ConfigDict) -> None:
    """As Fast-DFKD's benchmark runs it, on every pair alike.

    Source: the scripts of its repository.  Its table says 500 steps, its script has 200.  CMI's own
    scripts have student batches of 128 and `contrast_temperature=0.1`; with images inverted before,
    `ce=0.5`.
    """
    common_benchmark.inversion(config)
    config.generator = dict(
        model='dcgan_generator', latent=256, width=64, lr=1e-3, beta1=0.5, beta2=0.999
    )
    config.head = dict(width=256, lr=1e-3)
    config.loss = dict(
        bn=1.0,
        ce=1.0,
        adversarial=0.5,
        contrast=0.8,
        contrast_temperature=0.2,
        bn_momentum=0.0,
        temperature=20.0,
    )
    config.synthesis.update(
        memory=40_960,  # images whose features are kept for the contrast
        negatives=4096,  # of them at a step
        local_area=0.25,  # the least share of an image that a local view shows
    )
    config.phases = (common.phase(rounds=200, g_steps=200, s_steps=400),)


def small(config: ConfigDict) -> None:
    """A narrow generator, small batches and high rates, for minutes of a CPU.  Ours."""
    common_benchmark.small_inversion(config)
    config.generator.update(latent=64, width=16, lr=1e-2)
    config.head.width = 64
    config.synthesis.update(memory=8 * 128, negatives=256)


def adapt(config: ConfigDict, flags: set[str]) -> None:
    """Ours: nothing is published for these data sets.  ImageNet's bank takes 6 GB."""
    match config.data.name:
        case 'digits':
            small(config)
            config.synthesis.update(bank=70 * 128, crop_padding=1, flip=False)
            config.phases = (
                common.phase(rounds=5, g_steps=40, s_steps=0),
                common.phase(rounds=20, g_steps=40, s_steps=50),
            )
        case 'fashion_mnist':
            small(config)
            config.synthesis.update(bank=160 * 128, crop_padding=2, shade=0.7, cutmix=0.5)
            config.phases = (
                common.phase(rounds=5, g_steps=50, s_steps=0),
                common.phase(rounds=80, g_steps=50, s_steps=80),
            )
        case 'cifar10' if 'small' in flags:
            small(config)
            config.generator.update(width=32)
            config.synthesis.update(bank=300 * 128, shade=0.7, cutmix=0.5)
            config.phases = (
                common.phase(rounds=5, g_steps=50, s_steps=0),
                common.phase(rounds=160, g_steps=50, s_steps=100),
            )
        case 'imagenet' | 'domainnet':
            config.generator.update(model='dcgan_deep_generator', lr=2e-4)
            config.synthesis.update(batch_size=100, student_batch_size=100, bank=400 * 100)
            config.synthesis.update(memory=400 * 100, crop_padding=28)
