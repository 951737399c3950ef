"""DFQ (https://arxiv.org/abs/2005.04136).

On record, the accuracy of the student at the last step:

    fashion_mnist    46.65 ± 3.92 %, three seeds, cut to 100 s of one CPU core
                     (experiments/compare/resnet8)
"""

from ml_collections import ConfigDict

from dfkd_jax.configs import common, common_benchmark

LOOP = 'alternating'
FLAGS = ('untrained', 'benchmark')


def published(config: ConfigDict) -> None:
    """The setting of CMI's and Fast-DFKD's benchmark, since its authors publish no code.

    There are 40 rounds in an epoch.  The flag `benchmark` changes nothing on the CIFAR data.
    """
    common_benchmark.generator_only(config)
    config.loss = dict(adversarial=1.0, bn=1.0, one_hot=1.0, balance=20.0, kd=1.0, temperature=1.0)
    config.phases = (common.phase(rounds=200 * 40, g_steps=1, s_steps=10),)


def small(config: ConfigDict) -> None:
    """A narrow generator, for minutes of a CPU.  Ours."""
    common_benchmark.small_generator_only(config)


def adapt(config: ConfigDict, flags: set[str]) -> None:
    """Ours, but for CIFAR-100."""
    match config.data.name:
        case 'digits' if 'benchmark' not in flags:
            small(config)
        case 'fashion_mnist' if 'benchmark' not in flags:
            small(config)
            config.generator.lr = 3e-2
            config.phases = (common.phase(rounds=1000, g_steps=5, s_steps=5),)
        case 'cifar10' if 'small' in flags:
            small(config)
            config.generator.update(width=32, lr=3e-2)
            config.phases = (common.phase(rounds=3000, g_steps=5, s_steps=5),)
        case 'cifar100':
            config.student.lr = 0.05  # CMI's script for ResNet-34 -> ResNet-18
        case 'imagenet' | 'domainnet':
            config.generator.model = 'dcgan_deep_generator'
