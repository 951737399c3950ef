"""What every config shares: the run, the data, the recipe of a training on real data, the flags.

A config file names a data set, a teacher and a student.  `with_method` adds a method from
``methods/NAME.py``, which has

    LOOP                     the loop of dfkd_jax/loops that runs it
    FLAGS                    the flags it has, beside `smoke`
    published(config)        its published hyper-parameters, with their source
    adapt(config, flags)     what its flags and the data set change

Every number a paper tunes is a field.  Fields are locked, so a misspelt `--config.` flag fails.
"""

import importlib
from pathlib import Path

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from dfkd_jax.configs import common_flags
from dfkd_jax.errors import ConfigError

METHODS = tuple(sorted(path.stem for path in (Path(__file__).parent / 'methods').glob('*.py')))
# Flags that choose a run's whole setting, so one of them at the most.
WHOLE = frozenset(('as_published', 'benchmark', 'small'))


def with_method(config: ConfigDict, arg: str | None, default='cpsc', more=()) -> ConfigDict:
    """The config with the method and the flags that `arg`, METHOD[,FLAG...], names.

    Raises ConfigError for another word, listing these and `more`, the flags of the data set, and
    for two whole settings.
    """
    words = [word for word in (arg or '').split(',') if word]
    name = next((word for word in words if word in METHODS), default)
    if name in words:
        words.remove(name)
    flags = set(words)
    method = importlib.import_module(f'dfkd_jax.configs.methods.{name}')
    known = ('smoke', *method.FLAGS, *more)
    if unknown := sorted(flags.difference(known)):
        raise ConfigError(
            f'config argument {arg!r}: found {", ".join(unknown)}; expected METHOD[,FLAG...], '
            f'METHOD one of {", ".join(METHODS)} (if none is named, {default}), and FLAG, for '
            f'{name}, one of {", ".join(known)}.'
        )
    if len(whole := sorted(flags.intersection(WHOLE))) > 1:
        raise ConfigError(
            f'config argument {arg!r}: found {" and ".join(whole)}, two settings of one run; '
            f'expected one of them, e.g. {name},{whole[0]}.'
        )
    config.method, config.loop = name, method.LOOP
    method.published(config)
    if 'loss' in config:
        config.loss = options(config.loss)
    method.adapt(config, flags)
    cadences(config)
    if 'untrained' in flags:
        common_flags.untrained(config)
    if 'smoke' in flags:
        common_flags.smoke(config)
    return config


def run(**changes) -> ConfigDict:
    """The run itself: what is not the method's."""
    config = ConfigDict(
        dict(
            seed=0,
            parallel='shard_map',  # jit (one device) / pmap / shard_map (all, of all hosts)
            convolutions='auto',  # on CPUs: auto (Winograd's where g++ compiles them) / xla
            distributed=distributed(),
            # In the place of loss.bn where the teacher has no batch norms, root mean squares; ours.
            # Such as tv=0.1, l2=0.01: experiments/no_batch_norm has what these were worth.
            image_prior=dict(tv=0.0, l2=0.0),
            # Where loss.student='msarc': weights, and the temperature of its divergence.
            msarc=dict(kd=1.0, cam=1.0, gradcam=1.0, temperature=30.0),
            dtype='float32',  # of activations: float32 / bfloat16; weights, statistics, losses stay
            log_every_rounds=50,
            eval_every_rounds=50,
            save_every_rounds=50,
            eval_batch_size=500,
            keep_checkpoints=2,
            # Measurements in a row of a collapsed generator after which a run ends; 0: it goes on.
            collapse_patience=3,
        )
    )
    config.update(changes)
    return config


def distributed() -> ConfigDict:
    """Several processes as one run, each started with the same command and a `process_id`."""
    return ConfigDict(
        dict(
            coordinator='',  # HOST:PORT, a free port on process 0's host; '': one process
            num_processes=0,
            process_id=-1,
            auto=False,  # find the three in the environment: Slurm, Cloud TPU, Open MPI, Kubernetes
            join_seconds=300.0,  # how long to wait for all to come
            silent_seconds=60.0,  # after which a process that says nothing is gone
        )
    )


def options(loss: ConfigDict) -> dict:
    """A method's losses, with the choices that its published setting makes none of."""
    choices = dict(student='kd')  # kd / msarc: what the student imitates (methods/shared/msarc.py)
    if 'bn' in loss:
        choices['bn_form'] = 'sum'  # as published / normalised: losses.bn_statistics; another `bn`
    return choices | dict(loss.items())


def data(
    name: str, num_classes: int, image_size: int, channels: int = 3, resize: str = 'resize'
) -> ConfigDict:
    """The real data: its test split measures, its training split makes teachers, upper bounds.

    A data-free run needs neither: without them (name='', or a set that is nowhere), agreement with
    the teacher on held-out synthetic images is measured in place of accuracy.
    """
    return ConfigDict(
        dict(
            name=name,
            data_dir=placeholder(str),  # else $TFDS_DATA_DIR, else ~/tensorflow_datasets
            num_classes=num_classes,
            image_size=image_size,
            channels=channels,  # 3 on a grey set repeats the channel
            resize=resize,  # pad / resize / crop (short side to size * 256 / 224, centre crop)
            # Of images in [0, 1]; None: the data set's published ones.  Without one, set them.
            mean=placeholder(tuple),
            std=placeholder(tuple),
        )
    )


def teacher(model: str, train: bool = False) -> ConfigDict:
    """The teacher: a checkpoint to port or a model folder; trained from `teach` if `train`."""
    return ConfigDict(dict(model=model, checkpoint=placeholder(str), train=train))


def student(model: str) -> ConfigDict:
    """The student, whose optimiser is the method's."""
    return ConfigDict(dict(model=model))


def teach(epochs: int, batch_size: int, lr: float, **changes) -> ConfigDict:
    """Training on real data (teachers, students' upper bounds): SGD, one cosine to zero.

    Defaults are NAYER's teacher recipe.
    """
    recipe = ConfigDict(
        dict(
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            warmup_epochs=0.0,
            momentum=0.9,
            nesterov=False,
            weight_decay=5e-4,
            final_lr=0.0,
            milestones=(),  # epochs after which the rate is a tenth, in place of the cosine
            crop_padding=4,
            random_resized_crop=False,  # an area of 8 to 100 % of the image, in place of crops
            flip=True,
            shade=0.0,  # as for cpsc, by another image of the batch; only towards a teacher
            cutmix=0.0,
            kd_temperature=4.0,  # ordinary distillation on real data: alpha KD + (1 - alpha) CE
            kd_weight=0.9,
            save_every_epochs=1,
            eval_every_epochs=1,
        )
    )
    recipe.update(changes)
    return recipe


def phase(rounds: int, g_steps: int, s_steps: int, loops: int = 1) -> ConfigDict:
    """`rounds` times: `loops` batches of synthesis of `g_steps` updates, then `s_steps` updates."""
    return ConfigDict(dict(rounds=rounds, loops=loops, g_steps=g_steps, s_steps=s_steps))


def cadences(config: ConfigDict) -> None:
    """To measure at every 500 steps and save at 2,000, or at the config's own rounds if sooner."""
    phases = config.get('phases', ())
    steps = max((p.loops * p.g_steps + p.s_steps for p in phases), default=1)
    for name, every in (('log', 500), ('eval', 500), ('save', 2000)):
        field = f'{name}_every_rounds'
        config[field] = min(config[field], max(1, every // max(steps, 1)))
