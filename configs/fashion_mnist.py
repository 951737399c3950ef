"""Fashion-MNIST at 32 px: ResNet-8 with a space-to-depth stem -> half its width, for CPUs."""

from configs import common


def get_config(arg: str | None = None):
    """`[METHOD][,smoke][,as_published|benchmark][,CONTROL]`, METHOD one of common.METHODS.

    Without one, cpsc.  CONTROL: untrained, or for diffdfkd unguided / noise.
    """
    method, flags = common.parse(arg)
    config = common.run(method)
    config.data = common.data(
        'fashion_mnist', num_classes=10, image_size=32, channels=1, resize='pad'
    )
    config.teacher = common.teacher('resnet8_s2d', train=True)
    config.teach = common.teach(epochs=15, batch_size=128, lr=0.1, crop_padding=2)
    common.use(config, method, 'resnet8_s2d_half', flags)
    if method == 'cpsc' and 'as_published' not in flags:
        common.small_cpsc(config)
        config.generator.update(lr=8e-3, decay=True, class_brightness=False, darkest=0.5)
        config.loss.update(bn=10.0, ce=4.0)
        config.synthesis.update(bank=160 * 128, crop_padding=2, flip=True, shade=0.7, cutmix=0.5)
        config.student.update(lr=0.2, warmup_steps=100)
        config.phases = (common.phase(rounds=380, g_steps=3, s_steps=20),)
    elif method == 'diffdfkd':
        if 'as_published' not in flags:
            common.small_diffdfkd(config)
            config.distil.update(shade=0.7, cutmix=0.5, epochs=60)
        config.prior.path = 'clipart32'  # ships with the package
    elif method in common.GENERATIVE and 'benchmark' not in flags:
        common.small_generative(config, method)
        config.generator.lr = {'dafl': 3e-2, 'dfq': 3e-2, 'dfad': 1e-2}.get(method, 1e-3)
        g_steps, s_steps = (5, 5) if method in ('dafl', 'dfq') else (1, 10)
        config.phases = (common.phase(rounds=1000, g_steps=g_steps, s_steps=s_steps),)
    elif method == 'noise':
        common.small_noise(config, rounds=400)
    elif method in common.EMBEDDED:
        common.small_embeddings(config, method)
        config.synthesis.update(bank=170 * 120, crop_padding=2, shade=0.7, cutmix=0.5)
        config.phases = (
            common.phase(rounds=3, g_steps=30, s_steps=0),
            common.phase(rounds=157, g_steps=10, s_steps=40),
        )
    elif method in common.INVERTED:
        common.small_inverted(config, method)
        if method == 'deepinversion':
            config.loss.bn = 10.0
        config.synthesis.update(bank=160 * 128, crop_padding=2, shade=0.7, cutmix=0.5)
        g_steps, s_steps, rounds = {'fast': (10, 40, 157)}.get(method, (50, 80, 80))
        config.phases = (
            common.phase(rounds=5, g_steps=g_steps, s_steps=0),
            common.phase(rounds=rounds, g_steps=g_steps, s_steps=s_steps),
        )
    config.log_every_rounds = 20
    config.eval_every_rounds, config.save_every_rounds = 20, 100
    return common.finish(config, flags)
