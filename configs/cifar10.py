"""CIFAR-10: ResNet-34 -> ResNet-18 and the other standard pairs, CPSC-DFKD's schedule.

Pairs: --config.teacher.model / --config.student.model, one of resnet34/resnet18, vgg11/resnet18,
wrn40_2/wrn16_1, wrn40_2/wrn40_1, wrn40_2/wrn16_2.

Published for CIFAR-10: the data set's classes and the logarithmic form of the imitation term; the
weights are those of the authors' CIFAR-100 command, carried over by us.
"""

from configs import common


def get_config(arg: str | None = None):
    """`[METHOD][,smoke][,as_published|benchmark][,CONTROL]`, METHOD one of common.METHODS.

    Without one, cpsc.  CONTROL: untrained, or for diffdfkd unguided / noise.
    """
    method, flags = common.parse(arg)
    config = common.run(method)
    config.data = common.data('cifar10', num_classes=10, image_size=32)
    config.teacher = common.teacher('resnet34')
    config.teach = common.teach(epochs=200, batch_size=256, lr=0.1)
    common.use(config, method, 'resnet18', flags)
    if method == 'cpsc':
        config.loss.ikd_form = 'log'
    return common.finish(config, flags)
