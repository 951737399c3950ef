"""NAYER (https://arxiv.org/abs/2310.00258).

On record, the accuracy of the student at the last step:

    digits           98.89 %, one seed, 243 s of a shared CPU core (experiments/digits)
    fashion_mnist    85.98 ± 0.40 %, three seeds, 573 s of two CPU cores (experiments/fashion_mnist)
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from dfkd_jax.configs import common

LOOP = 'alternating'
FLAGS = ('untrained',)


def published(config: ConfigDict) -> None:
    """The authors' CIFAR-10 setting, 100 epochs after the warm-up, the shortest of three.

    Source: their script nayer_100.sh and their code's defaults.  Their pool keeps every image, ours
    the last 160,000, which is all that 100 epochs make.
    """
    config.student.update(lr=0.2, final_lr=2e-4, momentum=0.9, weight_decay=1e-4)
    config.labels = dict(  # the embeddings of the classes' names that the generator starts from
        source='table',  # a stored table / minilm / clip / onehot
        path=placeholder(str),  # of the table or the encoder's folder; None: the shipped ones
        text='names',  # names / index ("class 7")
        prompt='a image of {}',  # as NAYER's code writes it
        standardise=True,  # each dimension over the classes
    )
    config.generator = dict(
        model='nayer_generator',
        noisy_width=1000,
        width=64,
        life=10,  # rounds from one new generator to the next; 0: one for the whole run
        lr=4e-3,
        beta1=0.5,
        beta2=0.999,
    )
    config.loss = dict(bn=10.0, ce=0.5, adversarial=1.33, bn_momentum=0.9, temperature=20.0)
    config.synthesis = dict(
        batch_size=400,
        student_batch_size=512,
        bank=400 * 400,
        crop_padding=4,
        flip=True,
        shade=0.0,  # as for cpsc; ours
        cutmix=0.0,
    )
    config.phases = (
        common.phase(rounds=20, loops=10, g_steps=30, s_steps=0),
        common.phase(rounds=100, loops=2, g_steps=30, s_steps=400),
    )


def small(config: ConfigDict) -> None:
    """A narrow generator and small batches, for minutes of a CPU.  Ours.

    What pays most is a high rate: ten steps have to make images of a batch's noise.
    """
    config.generator.update(width=16, lr=32e-3)
    config.loss.update(ce=1.0, adversarial=1.0, temperature=4.0)
    config.synthesis.update(batch_size=120, student_batch_size=128)


def adapt(config: ConfigDict, flags: set[str]) -> None:
    """The schedules, and its own generator: one for the whole run where runs are short."""
    schedule(config, flags)
    match config.data.name:
        case 'digits' | 'fashion_mnist':
            small(config)
            config.generator.update(noisy_width=64, life=0)
        case 'cifar10' if 'small' in flags:
            small(config)
            config.generator.update(noisy_width=64, life=0, width=32, lr=1e-2)
        case 'imagenet' | 'domainnet':
            config.generator.model = 'nayer_deep_generator'


def schedule(config: ConfigDict, flags: set[str]) -> None:
    """Rates, batches, bank and phases.

    Those of CIFAR-100 and Tiny-ImageNet are of nayer_100.sh.  ImageNet's are ours: Tiny-ImageNet's
    schedule, and a bank of 40,000 images (6 GB).
    """
    match config.data.name:
        case 'digits':
            config.synthesis.update(bank=170 * 120, crop_padding=1, flip=False)
            config.phases = (
                common.phase(rounds=3, g_steps=30, s_steps=0),
                common.phase(rounds=64, g_steps=10, s_steps=20),
            )
        case 'fashion_mnist':
            config.synthesis.update(bank=170 * 120, crop_padding=2, shade=0.7, cutmix=0.5)
            config.phases = (
                common.phase(rounds=3, g_steps=30, s_steps=0),
                common.phase(rounds=157, g_steps=10, s_steps=40),
            )
        case 'cifar10' if 'small' in flags:
            config.synthesis.update(bank=300 * 120, shade=0.7, cutmix=0.5)
            config.phases = (
                common.phase(rounds=10, g_steps=30, s_steps=0),
                common.phase(rounds=400, g_steps=10, s_steps=40),
            )
        case 'cifar100':
            for phase in config.phases:
                phase.g_steps = 40
        case 'tiny_imagenet':
            config.student.lr = 0.1
            config.labels.source = 'minilm'  # a table of 200 names does not ship
            config.synthesis.update(batch_size=200, student_batch_size=256, bank=800 * 200)
            config.phases = (
                common.phase(rounds=20, loops=20, g_steps=60, s_steps=0),
                common.phase(rounds=100, loops=4, g_steps=60, s_steps=1000),
            )
        case 'imagenet' | 'domainnet':
            config.student.lr = 0.1
            config.labels.source = 'minilm'  # nor does one of a thousand
            config.synthesis.update(batch_size=200, student_batch_size=256, bank=200 * 200)
            config.synthesis.crop_padding = 28
            config.phases = (
                common.phase(rounds=20, loops=5, g_steps=60, s_steps=0),
                common.phase(rounds=100, loops=4, g_steps=60, s_steps=1000),
            )
