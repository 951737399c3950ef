"""scikit-learn's digits at 16 px: ResNet-8 -> half its width, for minutes of a CPU.

    python -m dfkd_jax.main --config=digits

The images ship with scikit-learn.  The run trains its own teacher, which reaches 99.68 ± 0.27 %
(six seeds, experiments/digits).
"""

from dfkd_jax.configs import common


def get_config(arg: str | None = None):
    """`[METHOD][,FLAG...]`, e.g. `nayer,smoke`: a file of methods/, cpsc if none is named."""
    config = common.run(log_every_rounds=10, eval_every_rounds=10, save_every_rounds=30)
    config.eval_batch_size = 360
    config.data = common.data('digits', num_classes=10, image_size=16, channels=1)
    config.teacher = common.teacher('resnet8', train=True)
    config.student = common.student('resnet8_half')
    config.teach = common.teach(epochs=15, batch_size=64, lr=0.1, crop_padding=1, flip=False)
    return common.with_method(config, arg)
