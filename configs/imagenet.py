"""ImageNet at 224 px: ResNet-50 -> ResNet-18 with the methods' deep generators.

    python -m dfkd_jax.main --config=imagenet:fast --config.data.data_dir=DIR \\
        --config.teacher.checkpoint=resnet50.pth

Settings are ours, except Fast-DFKD's: no run of the other methods on ImageNet is published.  The
generators are those that CPSC-DFKD's and NAYER's code offer for 224 px; batches and rates are
scaled down from their settings.  No full run is on record.
"""

from dfkd_jax.configs import common


def get_config(arg: str | None = None):
    """`[METHOD][,FLAG...]`, e.g. `nayer,smoke`: a file of methods/, cpsc if none is named."""
    config = common.run(dtype='bfloat16', eval_batch_size=256)
    config.data = common.data('imagenet', num_classes=1000, image_size=224, resize='crop')
    config.teacher = common.teacher('resnet50_imagenet')
    config.student = common.student('resnet18_imagenet')
    config.teach = common.teach(
        epochs=90, batch_size=256, lr=0.1, weight_decay=1e-4, crop_padding=28
    )
    return common.with_method(config, arg)
