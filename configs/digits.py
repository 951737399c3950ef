"""scikit-learn's digits, embedded: ResNet-8 -> half its width at 16 px, in about two minutes."""

from configs import common


def get_config(arg: str | None = None):
    """`[METHOD][,smoke][,as_published|benchmark][,CONTROL]`, METHOD one of common.METHODS.

    Without one, cpsc.  CONTROL: untrained, or for diffdfkd unguided / noise.
    """
    method, flags = common.parse(arg)
    config = common.run(method)
    config.data = common.data('digits', num_classes=10, image_size=16, channels=1)
    config.teacher = common.teacher('resnet8', train=True)
    config.teach = common.teach(epochs=15, batch_size=64, lr=0.1, crop_padding=1, flip=False)
    common.use(config, method, 'resnet8_half', flags)
    if method == 'cpsc' and 'as_published' not in flags:
        common.small_cpsc(config)
        config.generator.decay = True
        config.loss.bn = 5.0
        config.synthesis.update(bank=80 * 128, crop_padding=1)
        config.student.update(lr=0.2, warmup_steps=50)
        config.phases = (common.phase(rounds=72, g_steps=3, s_steps=20),)
    elif method == 'diffdfkd':
        if 'as_published' not in flags:
            common.small_diffdfkd(config)
            config.synthesis.per_class, config.distil.epochs = 128, 100
        config.prior.path = 'strokes16'  # ships with the package
    elif method in common.GENERATIVE and 'benchmark' not in flags:
        common.small_generative(config, method)
        config.phases = (common.phase(rounds=200, g_steps=1, s_steps=10),)
    elif method == 'noise':
        common.small_noise(config, rounds=100)
    elif method in common.EMBEDDED:
        common.small_embeddings(config, method)
        config.synthesis.update(bank=170 * 120, crop_padding=1, flip=False)
        config.phases = (
            common.phase(rounds=3, g_steps=30, s_steps=0),
            common.phase(rounds=64, g_steps=10, s_steps=20),
        )
    elif method in common.INVERTED:
        common.small_inverted(config, method)
        config.synthesis.update(bank=70 * 128, crop_padding=1, flip=False)
        g_steps, s_steps, rounds = {
            'fast': (10, 20, 64), 'cmi': (40, 50, 20), 'deepinversion': (50, 40, 32),
        }[method]  # fmt: skip
        config.phases = (
            common.phase(rounds=5, g_steps=g_steps, s_steps=0),
            common.phase(rounds=rounds, g_steps=g_steps, s_steps=s_steps),
        )
    config.log_every_rounds = config.eval_every_rounds = 10
    config.save_every_rounds = 30
    config.eval_batch_size = 360
    return common.finish(config, flags)
