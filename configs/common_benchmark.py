"""The benchmark of CMI and Fast-DFKD, from which seven methods take settings.

Its two repositories run every method under one schedule: 200 epochs, batches of 256, one cosine.
Source: their scripts for CIFAR-10 (WRN-40-2 -> WRN-16-1) and the defaults of their drivers.
"""

from ml_collections import ConfigDict

from dfkd_jax.configs import common


def generator_only(config: ConfigDict) -> None:
    """What DAFL, ZSKT, DFAD and DFQ share there: a generator of plain latents, fresh images.

    The student's adversary is that of Fast-DFKD's code, in eval mode.
    """
    config.student = dict(
        model=config.student.model,
        optimiser='sgd',  # sgd / adam, with `momentum` for its first moment
        lr=0.1,
        final_lr=2e-4,
        momentum=0.9,
        weight_decay=1e-4,
        milestones=(),  # shares of the run after which rates are a tenth, in place of a cosine
        clip=0.0,  # the largest norm of a gradient, the generator's too; 0: any
    )
    config.generator = dict(
        model='dcgan_generator',
        latent=256,
        width=64,
        ending='pixels',  # pixels / norm / affine
        lr=1e-3,
        beta1=0.5,
        beta2=0.999,
        decay=False,  # whether the rate falls as the student's does
    )
    config.synthesis = dict(
        batch_size=256,
        student_batch_size=256,
        fresh=True,  # latents at every step; else once a round
        adversary='eval',  # train / eval: the student; teacher: the benchmark's mistake
    )
    config.phases = (common.phase(rounds=200 * 80, g_steps=1, s_steps=5),)


def small_generator_only(config: ConfigDict) -> None:
    """A narrow generator and small batches, for minutes of a CPU.  Ours."""
    config.generator.update(latent=64, width=16)
    config.synthesis.update(batch_size=128, student_batch_size=128)
    config.phases = (common.phase(rounds=200, g_steps=1, s_steps=10),)


def inversion(config: ConfigDict) -> None:
    """What DeepInversion, CMI and Fast-DFKD share there: batches that are optimised, and a bank.

    An epoch is one batch of synthesis and 400 steps of the student.  The bank holds all that a run
    makes.
    """
    config.student.update(lr=0.1, final_lr=2e-4, momentum=0.9, weight_decay=1e-4)
    config.synthesis = dict(
        batch_size=256,
        student_batch_size=256,
        bank=200 * 256,
        crop_padding=4,
        flip=True,
        shade=0.0,  # as for cpsc; ours
        cutmix=0.0,
    )


def small_inversion(config: ConfigDict) -> None:
    """Small batches and a high rate of the student, for minutes of a CPU.  Ours."""
    config.student.lr = 0.2
    config.loss.temperature = 4.0
    config.synthesis.update(batch_size=128, student_batch_size=128)
