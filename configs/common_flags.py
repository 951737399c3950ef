"""Flags that any method has, or most: the control without training, and a run of a minute."""

from ml_collections import ConfigDict


def untrained(config: ConfigDict) -> None:
    """The control: the same run with a generator, or pixels, that never train."""
    group = config.generator if 'generator' in config else config.pixels
    for rate in ('lr', 'latent_lr', 'meta_lr'):
        if rate in group:
            group[rate] = 0.0


def smoke(config: ConfigDict) -> None:
    """Shrinks any run to about a minute: the same program at a fraction of its length and batch."""
    if 'prior' in config:
        config.prior.steps, config.in_loop.steps, config.distil.epochs = 5, 2, 2
        config.synthesis.per_class = 3 * config.synthesis.batch_size
        if config.synthesis.batch_size > 8:
            config.synthesis.update(batch_size=8, per_class=24)
        config.in_loop.update(every=8, start=8)
        config.distil.batch_size = config.in_loop.batch_size = 16
        config.distil.milestones = ()
    elif 'phases' in config:
        for phase in config.phases:
            steps = min(phase.g_steps, 2), min(phase.s_steps, 2)
            phase.update(rounds=2, loops=1, g_steps=steps[0], s_steps=steps[1])
        if 'generator' in config:
            config.generator.width = min(config.generator.width, 16)
        config.synthesis.batch_size = config.synthesis.student_batch_size = 16
        for name, size in (('bank', 64), ('memory', 64), ('negatives', 32)):
            if name in config.synthesis:
                config.synthesis[name] = min(config.synthesis[name], size)
    config.teach.epochs = 1
    config.eval_batch_size = 100
    config.log_every_rounds = config.eval_every_rounds = config.save_every_rounds = 1
