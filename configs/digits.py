"""scikit-learn's digits, embedded: ResNet-8 -> half its width at 16 px, in about two minutes."""

from configs import common


def get_config(arg: str | None = None):
    """`[cpsc][,smoke][,as_published][,untrained]`."""
    method, flags = common.parse(arg)
    config = common.run(method)
    config.data = common.data('digits', num_classes=10, image_size=16, channels=1)
    config.teacher = common.teacher('resnet8', train=True)
    config.teach = common.teach(epochs=15, batch_size=64, lr=0.1, crop_padding=1, flip=False)
    common.cpsc(config, student='resnet8_half', as_published='as_published' in flags)
    if 'as_published' not in flags:
        common.small_cpsc(config)
        config.generator.decay = True
        config.loss.bn = 5.0
        config.synthesis.update(bank=80 * 128, crop_padding=1)
        config.student.update(lr=0.2, warmup_steps=50)
        config.phases = (common.phase(rounds=72, g_steps=3, s_steps=20),)
    config.log_every_rounds = config.eval_every_rounds = 10
    config.save_every_rounds = 30
    config.eval_batch_size = 360
    return common.finish(config, flags)
