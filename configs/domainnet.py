"""Ten classes of one domain of DomainNet at 224 px: ResNet-34 -> ResNet-18, DiffDFKD's own data.

    python -m dfkd_jax.data prepare domainnet --data_dir=DIR --source=FOLDER
    python -m dfkd_jax.main --config=domainnet --config.data.data_dir=DIR \\
        --config.teacher.checkpoint=FILE --config.prior.path=stable-diffusion-v1-5

FOLDER holds the images of one domain (clipart, infograph, painting, quickdraw, real or sketch), as
train/CLASS/* and test/CLASS/*.  Classes are numbered alphabetically; the authors' checkpoints have
airplane, clock, axe, basketball, bicycle, bird, strawberry, flower, pizza, bracelet.

DiffDFKD's settings are its authors'.  The other methods have their ImageNet settings: no run of
theirs is published.  No full run is on record.
"""

from dfkd_jax.configs import common


def get_config(arg: str | None = None):
    """`[METHOD][,FLAG...]`, e.g. `nayer,smoke`: a file of methods/, diffdfkd if none is named."""
    config = common.run(dtype='bfloat16', eval_batch_size=256)
    config.data = common.data('domainnet', num_classes=10, image_size=224, resize='crop')
    config.teacher = common.teacher('resnet34_imagenet')
    config.student = common.student('resnet18_imagenet')
    config.teach = common.teach(
        epochs=120, batch_size=64, lr=0.01, weight_decay=2e-4, crop_padding=28
    )
    return common.with_method(config, arg, default='diffdfkd')
