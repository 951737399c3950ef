"""CIFAR-100: ResNet-34 -> ResNet-18, CPSC-DFKD's published command, and the other standard pairs.

Pairs: --config.teacher.model / --config.student.model, one of resnet34/resnet18, vgg11/resnet18,
wrn40_2/wrn16_1, wrn40_2/wrn40_1, wrn40_2/wrn16_2.
"""

from configs import common


def get_config(arg: str | None = None):
    """`[METHOD][,smoke][,as_published|benchmark][,CONTROL]`, METHOD one of common.METHODS.

    Without one, cpsc.  CONTROL: untrained, or for diffdfkd unguided / noise.
    """
    method, flags = common.parse(arg)
    config = common.run(method)
    config.data = common.data('cifar100', num_classes=100, image_size=32)
    config.teacher = common.teacher('resnet34')
    config.teach = common.teach(epochs=200, batch_size=256, lr=0.1)
    common.use(config, method, 'resnet18', flags)
    if method == 'diffdfkd':
        config.synthesis.per_class = 500  # as many images as for CIFAR-10; ours
    elif method in common.EMBEDDED:
        for phase in config.phases:
            phase.g_steps = 40
    elif method == 'dafl' and 'benchmark' not in flags:
        config.loss.balance = 8.686  # --ie 20 in the README of its authors, over ln 10
    elif method == 'dfq':
        config.student.lr = 0.05  # CMI's script for ResNet-34 -> ResNet-18
    return common.finish(config, flags)
