"""The student that is audited here: the quick start's settings, for twice as many rounds.

python -m dfkd_jax.main --config=experiments/privacy/student.py --workdir=RUN \\
    --config.teacher.checkpoint=resnet20-12fca82f.th --config.data.data_dir=DIR
"""

from dfkd_jax.configs import cifar10, common
from dfkd_jax.configs.methods import nayer


def get_config(arg: str | None = None):
    """NAYER from the public ResNet-20, for minutes of a CPU core."""
    del arg
    config = cifar10.get_config('nayer,resnet20-resnet8')
    nayer.small(config)  # a narrow generator and small batches
    config.generator.update(noisy_width=64, life=0)
    config.synthesis.bank = 100 * 120
    config.phases = (
        common.phase(rounds=3, g_steps=30, s_steps=0),
        common.phase(rounds=24, g_steps=10, s_steps=40),
    )
    config.eval_every_rounds = config.save_every_rounds = 6
    return config
