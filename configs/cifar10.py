"""CIFAR-10: ResNet-34 -> ResNet-18, or another standard pair.

    python -m dfkd_jax.main --config=cifar10:nayer --config.data.data_dir=DIR \\
        --config.teacher.checkpoint=cifar10_resnet34.pth

Pairs: --config.teacher.model / --config.student.model, one of resnet34/resnet18, vgg11/resnet18,
wrn40_2/wrn16_1, wrn40_2/wrn40_1, wrn40_2/wrn16_2.

No full run is on record here; experiments/published.md has the numbers that others print.
"""

from dfkd_jax.configs import common


def get_config(arg: str | None = None):
    """`[METHOD][,FLAG...]`, e.g. `nayer,smoke`: a file of methods/, cpsc if none is named."""
    config = common.run()
    config.data = common.data('cifar10', num_classes=10, image_size=32)
    config.teacher = common.teacher('resnet34')
    config.student = common.student('resnet18')
    config.teach = common.teach(epochs=200, batch_size=256, lr=0.1)
    return common.with_method(config, arg)
