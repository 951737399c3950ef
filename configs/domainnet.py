"""Ten classes of one domain of DomainNet at 224 px: ResNet-34 -> ResNet-18, DiffDFKD's own data.

Prepare the images of one domain (clipart, infograph, painting, quickdraw, real or sketch), as
train/CLASS/* and test/CLASS/*, with `python -m dfkd_jax.data prepare domainnet --source=FOLDER`.
Classes are numbered alphabetically; the authors' checkpoints have airplane, clock, axe, basketball,
bicycle, bird, strawberry, flower, pizza, bracelet.

DiffDFKD's numbers are those of the authors' DomainNet scripts, with 4,500 images of each class
where their generation script says 200 a domain and their distillation reads up to 4,500.  The other
methods have their ImageNet settings here; nothing is published.
"""

from configs import common, imagenet

METHODS = ('diffdfkd', *(method for method in common.METHODS if method != 'diffdfkd'))


def get_config(arg: str | None = None):
    """`[METHOD][,smoke][,as_published|benchmark][,CONTROL]`, METHOD one of METHODS.

    Without one, diffdfkd.  CONTROL: unguided / noise, or for the others untrained.
    """
    method, flags = common.parse(arg, METHODS)
    config = common.run(method)
    config.data = common.data('domainnet', num_classes=10, image_size=224, resize='crop')
    config.teacher = common.teacher('resnet34_imagenet')
    config.teach = common.teach(
        epochs=120, batch_size=64, lr=0.01, weight_decay=2e-4, random_resized_crop=False,
        crop_padding=28,
    )  # fmt: skip
    common.use(config, method, 'resnet18_imagenet', flags)
    if method == 'diffdfkd':
        config.prior.update(steps=70, scale=7.0, prompt='an image.')
        config.synthesis.update(per_class=4500, stored_size=256)
        config.in_loop.update(batch_size=256, random_resized_crop=True)
        config.distil.update(
            epochs=220, batch_size=256, lr=0.1, weight_decay=1e-4, random_resized_crop=True
        )
    elif method == 'cpsc':
        config.generator.update(model='cpsc_deep_generator', lr=2e-4)
        config.synthesis.batch_size = config.synthesis.student_batch_size = 256
    elif method in common.EMBEDDED:
        imagenet.from_embeddings(config, method)
    elif method in common.INVERTED:
        imagenet.from_latents(config, method)
    elif method in common.GENERATIVE:
        config.generator.model = 'dcgan_deep_generator'
    config.dtype = 'bfloat16'
    config.eval_batch_size = 256
    return common.finish(config, flags)
