"""Tiny-ImageNet at 64 px: ResNet-34 -> ResNet-18 with CIFAR stems, CPSC-DFKD's CIFAR-100 weights.

The authors' script runs this data set with the same generator at 64 px; its weights for it are not
published, so those of CIFAR-100 are carried over by us.
"""

from configs import common


def get_config(arg: str | None = None):
    """`[cpsc][,smoke][,as_published][,untrained]`."""
    method, flags = common.parse(arg)
    config = common.run(method)
    config.data = common.data('tiny_imagenet', num_classes=200, image_size=64)
    config.teacher = common.teacher('resnet34')
    config.teach = common.teach(epochs=200, batch_size=256, lr=0.1)
    common.cpsc(config, student='resnet18', as_published='as_published' in flags)
    return common.finish(config, flags)
