"""ImageNet at 224 px: ResNet-50 -> ResNet-18 with the methods' deep generators.

Ours, but for Fast-DFKD: no run of the other methods on ImageNet is published.  The generators are
those that CPSC-DFKD's and NAYER's code offer for 224 px; batch and rates are scaled down from their
settings, untested at full length.
"""

from configs import common


def get_config(arg: str | None = None):
    """`[METHOD][,smoke][,as_published|benchmark][,CONTROL]`, METHOD one of common.METHODS.

    Without one, cpsc.  CONTROL: untrained, or for diffdfkd unguided / noise.
    """
    method, flags = common.parse(arg)
    config = common.run(method)
    config.data = common.data('imagenet', num_classes=1000, image_size=224, resize='crop')
    config.teacher = common.teacher('resnet50_imagenet')
    config.teach = common.teach(
        epochs=90, batch_size=256, lr=0.1, weight_decay=1e-4, crop_padding=28
    )
    common.use(config, method, 'resnet18_imagenet', flags)
    if method == 'cpsc':
        config.generator.model = 'cpsc_deep_generator'
        config.generator.lr = 2e-4  # Fast-DFKD's, for its 224 px generator
        config.synthesis.batch_size = config.synthesis.student_batch_size = 256
    elif method == 'diffdfkd':
        config.synthesis.update(per_class=100, stored_size=256)  # the repository's default
        config.in_loop.update(batch_size=256, random_resized_crop=True)
        config.distil.update(lr=0.1, weight_decay=1e-4, random_resized_crop=True)
    elif method in common.EMBEDDED:
        from_embeddings(config, method)
    elif method in common.INVERTED:
        from_latents(config, method)
    elif method in common.GENERATIVE:
        config.generator.model = 'dcgan_deep_generator'
    config.dtype = 'bfloat16'
    config.eval_batch_size = 256
    return common.finish(config, flags)


def from_embeddings(config, method: str):
    """NAYER's or CAE's weights, Tiny-ImageNet's schedule; a bank of 40,000 images (6 GB)."""
    deep = {'nayer': 'nayer_deep_generator', 'cae': 'dcgan_deep_generator'}
    config.generator.model = deep[method]
    config.labels.source = 'minilm'  # the table of a thousand names does not ship
    config.student.lr = 0.1
    config.synthesis.update(batch_size=200, student_batch_size=256, bank=200 * 200, crop_padding=28)
    config.phases = (
        common.phase(rounds=20, loops=5, g_steps=60, s_steps=0),
        common.phase(rounds=100, loops=4, g_steps=60, s_steps=1000),
    )


def from_latents(config, method: str):
    """Fast-DFKD, CMI or DeepInversion with batches of 100 and a bank of 40,000 images (6 GB).

    Of Fast-DFKD, the log of its ResNet-18 in its repository (53.45 %): Reptile, 50 steps, no
    warm-up, ten batches an epoch, of which there are 400.  Ours there: latents are new for each
    batch, where its code for ImageNet learns where they start too; padded crops where it resizes
    areas; the images of the lowest loss where it keeps the last; the generator.  The others have
    their CIFAR weights.
    """
    batch = 100
    config.synthesis.update(batch_size=batch, student_batch_size=batch, bank=400 * batch)
    config.synthesis.crop_padding = 28
    if method == 'deepinversion':
        return
    config.generator.update(model='dcgan_deep_generator', lr=2e-4)
    if method == 'cmi':
        config.synthesis.memory = 400 * batch
        return
    config.generator.update(meta='reptile', latent_lr=0.01, meta_lr=1e-4, reset_batch=0)
    config.loss.update(bn=0.1, ce=0.1, adversarial=1.0, temperature=5.0)
    config.student.update(lr=0.1, final_lr=0.0)
    config.phases = (common.phase(rounds=400 * 10, g_steps=50, s_steps=100),)
