"""ImageNet at 224 px: ResNet-50 -> ResNet-18 with CPSC-DFKD's deep generator.

Ours throughout: the authors published no ImageNet run.  The generator is the one their code offers
for 224 px; batch and rates are scaled down from their CIFAR-100 setting, untested at full length.
"""

from configs import common


def get_config(arg: str | None = None):
    """`[cpsc][,smoke][,as_published][,untrained]`."""
    method, flags = common.parse(arg)
    config = common.run(method)
    config.data = common.data('imagenet', num_classes=1000, image_size=224, resize='crop')
    config.teacher = common.teacher('resnet50_imagenet')
    config.teach = common.teach(
        epochs=90, batch_size=256, lr=0.1, weight_decay=1e-4, crop_padding=28
    )
    common.cpsc(config, student='resnet18_imagenet', as_published='as_published' in flags)
    config.dtype = 'bfloat16'
    config.generator.model = 'cpsc_deep_generator'
    config.generator.lr = 2e-4  # Fast-DFKD's, for its 224 px generator
    config.synthesis.batch_size = config.synthesis.student_batch_size = 256
    config.eval_batch_size = 256
    return common.finish(config, flags)
