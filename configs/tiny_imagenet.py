"""Tiny-ImageNet at 64 px: ResNet-34 -> ResNet-18 with CIFAR stems.

    python -m dfkd_jax.main --config=tiny_imagenet:nayer --config.data.data_dir=DIR \\
        --config.teacher.checkpoint=FILE

NAYER's settings are its authors'.  CPSC-DFKD's authors run this data set with the generator of
CIFAR-100 at 64 px and do not publish the weights of its losses; here they are those of CIFAR-100.
No full run is on record.
"""

from dfkd_jax.configs import common


def get_config(arg: str | None = None):
    """`[METHOD][,FLAG...]`, e.g. `nayer,smoke`: a file of methods/, cpsc if none is named."""
    config = common.run()
    config.data = common.data('tiny_imagenet', num_classes=200, image_size=64)
    config.teacher = common.teacher('resnet34')
    config.student = common.student('resnet18')
    config.teach = common.teach(epochs=200, batch_size=256, lr=0.1)
    return common.with_method(config, arg)
