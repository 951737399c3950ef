"""CIFAR-10: ResNet-34 -> ResNet-18, or another pair.

    python -m dfkd_jax.main --config=cifar10:nayer --config.data.data_dir=DIR \\
        --config.teacher.checkpoint=cifar10_resnet34.pth

The field's pairs: --config.teacher.model / --config.student.model, one of resnet34/resnet18,
vgg11/resnet18, wrn40_2/wrn16_1, wrn40_2/wrn40_1, wrn40_2/wrn16_2.

Pairs whose teacher is a published checkpoint, of github.com/akamaster/pytorch_resnet_cifar10, with
its normalisation (ImageNet's constants): cifar10:nayer,resnet20-resnet8, and those of `PUBLIC`.
ResNet-20 has 91.73 % and ResNet-56 93.39 % here, as its page prints.

`small` is meant for an hour or two of two CPU cores: cifar10:nayer,small, from the public ResNet-20
to ResNet-8 unless a pair is named.  Its numbers are ours, carried over from Fashion-MNIST's and not
tuned yet.

No full run is on record here; experiments/published.md has the numbers that others print.
"""

from dfkd_jax.configs import common

# FLAG: teacher, whose shortcuts are those of the paper (option A), and student
PUBLIC = {
    'resnet56-resnet20': ('resnet56_option_a', 'resnet20'),
    'resnet20-wrn16_1': ('resnet20_option_a', 'wrn16_1'),
    'resnet20-resnet8': ('resnet20_option_a', 'resnet8'),
}


SMALL = 'small'


def get_config(arg: str | None = None):
    """`[METHOD][,FLAG...]`, e.g. `nayer,smoke`: a file of methods/, cpsc if none is named."""
    config = common.run()
    config.data = common.data('cifar10', num_classes=10, image_size=32)
    config.teacher = common.teacher('resnet34')
    config.student = common.student('resnet18')
    config.teach = common.teach(epochs=200, batch_size=256, lr=0.1)
    words = [word for word in (arg or '').split(',') if word]
    if SMALL in words:
        config.teach.update(epochs=60, batch_size=128)
        if not set(words).intersection(PUBLIC):
            words.append('resnet20-resnet8')
    for pair in [word for word in words if word in PUBLIC]:
        config.teacher.model, config.student.model = PUBLIC[pair]
        config.data.update(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
        words.remove(pair)
    return common.with_method(config, ','.join(words), more=(SMALL, *PUBLIC))
