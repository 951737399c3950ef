"""Tiny-ImageNet at 64 px: ResNet-34 -> ResNet-18 with CIFAR stems, CPSC-DFKD's CIFAR-100 weights.

The authors' script runs this data set with the same generator at 64 px; its weights for it are not
published, so those of CIFAR-100 are carried over by us.
"""

from configs import common


def get_config(arg: str | None = None):
    """`[METHOD][,smoke][,as_published|benchmark][,CONTROL]`, METHOD one of common.METHODS.

    Without one, cpsc.  CONTROL: untrained, or for diffdfkd unguided / noise.
    """
    method, flags = common.parse(arg)
    config = common.run(method)
    config.data = common.data('tiny_imagenet', num_classes=200, image_size=64)
    config.teacher = common.teacher('resnet34')
    config.teach = common.teach(epochs=200, batch_size=256, lr=0.1)
    common.use(config, method, 'resnet18', flags)
    if method == 'diffdfkd':  # ours: its authors' code does not know this data set
        config.synthesis.per_class = 250
        config.distil.lr = 0.1
    elif method in common.EMBEDDED:  # NAYER's script nayer_100.sh for this data set
        config.labels.source = 'minilm'  # a table of 200 names does not ship
        config.student.lr = 0.1
        config.synthesis.update(batch_size=200, student_batch_size=256, bank=800 * 200)
        config.phases = (
            common.phase(rounds=20, loops=20, g_steps=60, s_steps=0),
            common.phase(rounds=100, loops=4, g_steps=60, s_steps=1000),
        )
    return common.finish(config, flags)
