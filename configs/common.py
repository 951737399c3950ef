"""What every config shares: its argument, the run, the real-data recipe, the methods' numbers.

A config file names a data set, a teacher and a student, then asks a method of this file for its
published hyper-parameters and changes what that data set changes.  Every number a paper tunes is a
field; fields are locked, so a misspelt `--config.` flag fails.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

METHODS = ('cpsc', 'nayer', 'cae', 'diffdfkd', 'fast', 'cmi', 'deepinversion')
METHODS += ('dafl', 'zskt', 'dfad', 'dfq', 'noise', 'kd')
GENERATIVE = ('dafl', 'zskt', 'dfad', 'dfq')  # a generator of plain latents, and no bank
EMBEDDED = ('nayer', 'cae')  # a generator of label embeddings
INVERTED = ('fast', 'cmi', 'deepinversion')  # latents or pixels that are trained, and a bank
FLAGS = ('smoke', 'as_published', 'benchmark', 'untrained', 'unguided', 'noise')


def parse(arg: str | None, methods: tuple[str, ...] = METHODS) -> tuple[str, set[str]]:
    """`cpsc,smoke` -> ('cpsc', {'smoke'}); the method may be left out.

    Raises ValueError for a word that is neither a method nor a flag.
    """
    words = [word for word in (arg or '').split(',') if word]
    chosen = [word for word in words if word in methods] or [methods[0]]
    if 'diffdfkd' in chosen and 'noise' in chosen:
        chosen.remove('noise')  # its control of that name
    unknown = [word for word in words if word not in methods and word not in FLAGS]
    if unknown or len(chosen) > 1:
        raise ValueError(
            f'config argument {arg!r}: expected one method of {", ".join(methods)} and any flags '
            f'of {", ".join(FLAGS)}, e.g. --config=configs/digits.py:{methods[0]},smoke.'
        )
    return chosen[0], set(words) & set(FLAGS) - {chosen[0]}


def run(method: str) -> ConfigDict:
    """The run itself: what is not the method's."""
    return ConfigDict(
        dict(
            method=method,
            loop={'diffdfkd': 'offline', 'kd': 'kd'}.get(method, 'alternating'),
            seed=0,
            parallel='shard_map',  # jit (one device) / pmap / shard_map (all, of all hosts)
            distributed=distributed(),
            dtype='float32',  # of activations: float32 / bfloat16; weights, statistics, losses stay
            log_every_rounds=50,
            eval_every_rounds=50,
            save_every_rounds=50,
            eval_batch_size=500,
            keep_checkpoints=2,
        )
    )


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


def data(name: str, num_classes: int, image_size: int, channels: int = 3, resize: str = 'resize'):
    """The real data: its test split measures, its training split makes teachers, upper bounds."""
    return ConfigDict(
        dict(
            name=name,
            data_dir=placeholder(str),  # else $TFDS_DATA_DIR, else ~/tensorflow_datasets
            num_classes=num_classes,
            image_size=image_size,
            channels=channels,  # 3 on a grey set repeats the channel
            resize=resize,  # pad / resize / crop (short side to size * 256 / 224, centre crop)
            mean=placeholder(tuple),  # of images in [0, 1]; None: the data set's published ones
            std=placeholder(tuple),
        )
    )


def teacher(model: str, train: bool = False) -> ConfigDict:
    """The teacher: a checkpoint to port or a model folder; trained from `teach` if `train`."""
    return ConfigDict(dict(model=model, checkpoint=placeholder(str), train=train))


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


def cpsc(config: ConfigDict, student: str, as_published: bool = False) -> None:
    """CPSC-DFKD at the authors' CIFAR-100 setting, 600 epochs of 50 rounds.

    Source: the README of their code gives the CIFAR-100 ResNet-34 -> ResNet-18 command (weights,
    epochs, batch, g_steps, latent); rates and widths are its scripts' defaults.  For other data
    sets nothing is published and these values are carried over.
    """
    config.student = ConfigDict(
        dict(
            model=student,
            lr=0.1,
            momentum=0.9,
            nesterov=False,
            weight_decay=5e-4,
            schedule='published' if as_published else 'cosine',
            warmup_steps=2500,  # ten epochs of 50 rounds of 5 steps; `published` has its own
        )
    )
    config.generator = ConfigDict(
        dict(
            model='cpsc_generator',
            latent=256,
            width=64,
            spread=0.0,  # of the class tables at the start; ours
            class_brightness=True,  # the last norm's scale and shift: by class, or one; ours
            bounded=False,  # images within the range of pixels; ours
            darkest=1.0,  # images are dimmed by U(darkest, 1); ours
            lr=1e-3,
            beta1=0.5,
            beta2=0.999,
            decay=False,  # cosine to zero; ours
            reset_adam=as_published,
        )
    )
    config.loss = ConfigDict(
        dict(
            kd=1.0,
            ikd=5.0,
            bn=1.0,
            scl=0.7,
            ce=0.7,
            ikd_form='mse',  # mse / log
            scl_temperature=0.07,
            temperature=1.0,  # of the student's distillation
            student_pseudo_labels=True,  # L_CE in the student's loss too
            double_softmax=as_published,
            adapter_normalise=not as_published,
        )
    )
    config.synthesis = ConfigDict(
        dict(
            batch_size=512,
            student_batch_size=512,
            update_student_statistics=as_published,
            bank=0,  # images kept for the student; 0: fresh ones at every step; ours
            crop_padding=0,  # augmentation of what the student sees; ours
            flip=False,
            shade=0.0,  # how deeply an image of the bank may be shaded by another; ours
            cutmix=0.0,  # the probability that a box of it shows another; ours
        )
    )
    config.phases = (phase(rounds=30_000, g_steps=6, s_steps=5),)


def small_cpsc(config: ConfigDict) -> None:
    """CPSC-DFKD for minutes of a CPU instead of days of a GPU.  Ours, and tuned without real data.

    Against the published setting: a narrow generator with a higher rate whose classes start apart,
    small batches, weights that let the class lead while the student is untrained, the logarithmic
    imitation term (the squared one diverges at these rates), a softened distillation without the
    pseudo-labels, and random crops.
    """
    config.generator.update(latent=64, width=16, spread=0.5, bounded=True, lr=3e-3)
    config.loss.update(ikd=1.0, ikd_form='log', scl=0.1, ce=1.0)
    config.loss.update(temperature=4.0, student_pseudo_labels=False)
    config.synthesis.update(batch_size=128, student_batch_size=128)


def use(config: ConfigDict, method: str, student: str, flags: set[str]) -> None:
    """A method's published hyper-parameters, for a student."""
    if method == 'cpsc':
        cpsc(config, student, as_published='as_published' in flags)
    else:
        {
            'nayer': nayer, 'cae': cae, 'diffdfkd': diffdfkd,
            'dafl': dafl, 'zskt': zskt, 'dfad': dfad, 'dfq': dfq,
            'fast': fast, 'cmi': cmi, 'deepinversion': deepinversion,
            'noise': noise, 'kd': kd,
        }[method](config, student)  # fmt: skip
    if method == 'deepinversion' and 'as_published' in flags:
        config.pixels.keep = 'last'
    if 'benchmark' in flags:
        benchmark(config, method, student)
    if method == 'diffdfkd' and 'as_published' in flags:
        guided = not flags & {'unguided', 'noise'}
        config.synthesis.update(batch_size=1, cutmix=False, final='stale', intermediate=guided)
        config.parallel = 'jit'  # one image cannot be shared


def labels() -> ConfigDict:
    """The embeddings of the classes' names that a generator starts from."""
    return ConfigDict(
        dict(
            source='table',  # a stored table / minilm / clip / onehot
            path=placeholder(str),  # of the table or the encoder's folder; None: the shipped ones
            text='names',  # names / index ("class 7")
            prompt='a image of {}',  # as NAYER's code writes it
            standardise=True,  # each dimension over the classes
        )
    )


def nayer(config: ConfigDict, student: str) -> None:
    """NAYER at the authors' CIFAR-10 setting, 100 epochs after the warm-up, the shortest of three.

    Source: their script nayer_100.sh and their code's defaults.  Their pool keeps every image, ours
    the last 160,000, which is all that 100 epochs make.
    """
    config.student = ConfigDict(
        dict(model=student, lr=0.2, final_lr=2e-4, momentum=0.9, weight_decay=1e-4)
    )
    config.labels = labels()
    config.generator = ConfigDict(
        dict(
            model='nayer_generator',
            noisy_width=1000,
            width=64,
            life=10,  # rounds from one new generator to the next
            lr=4e-3,
            beta1=0.5,
            beta2=0.999,
        )
    )
    config.loss = ConfigDict(
        dict(bn=10.0, ce=0.5, adversarial=1.33, bn_momentum=0.9, temperature=20.0)
    )
    config.synthesis = ConfigDict(
        dict(
            batch_size=400,
            student_batch_size=512,
            bank=400 * 400,
            crop_padding=4,
            flip=True,
            shade=0.0,  # as for cpsc; ours
            cutmix=0.0,
        )
    )
    config.phases = (
        phase(rounds=20, loops=10, g_steps=30, s_steps=0),
        phase(rounds=100, loops=2, g_steps=30, s_steps=400),
    )


def cae(config: ConfigDict, student: str) -> None:
    """CAE-DFKD: NAYER's setting with diffused embeddings in place of the noisy layer.

    The paper's numbers could not be read: four sources are its choice, all else is ours.
    """
    nayer(config, student)
    config.generator = ConfigDict(
        dict(
            model='dcgan_generator',
            width=64,
            life=0,  # rounds from one new generator to the next; 0: one for the whole run
            reset_adam=True,  # at every batch
            lr=4e-3,
            beta1=0.5,
            beta2=0.999,
        )
    )
    config.noise = ConfigDict(
        dict(
            sources=('normal', 'uniform', 'laplace', 'sign'),
            magnitudes=(20.0,) * 4,  # in standard deviations of an embedding over classes
            fresh=False,  # at every step of the generator; else once a batch
        )
    )
    config.loss.update(contrast=0.1, contrast_temperature=0.1, contrast_of='sources')
    config.synthesis.mixup = 0.0


def diffdfkd(config: ConfigDict, student: str) -> None:
    """DiffDFKD at the defaults of the authors' repository.

    The number of images and the distillation are those of its CIFAR-10 scripts.  Ours: batches of 8
    of a class where theirs are of one, in which Latent CutMix does nothing; bfloat16 where theirs
    is float16; a student in the loop that learns after every 100 images of a class where theirs
    does after every 10, of a hundred.
    """
    config.student = ConfigDict(dict(model=student))
    config.prior = ConfigDict(
        dict(
            path=placeholder(str),  # a folder of diffusers' format, e.g. Stable Diffusion 1.5
            dtype='bfloat16',  # of the U-Net and the decoder; steps and losses are float32
            remat=True,  # blocks are recomputed for the gradient: less memory, more time
            steps=50,
            scale=3.0,  # of classifier-free guidance
            prompt='A realistic photo.',  # with '{}', the class's name
            negative='',
        )
    )
    config.loss = ConfigDict(dict(bn=0.1, ce=1.0, adversarial=1.0))  # they are step sizes too
    config.synthesis = ConfigDict(
        dict(
            source='guided',  # guided / unguided / noise
            per_class=5000,
            batch_size=8,
            stored_size=config.data.image_size,
            bank=placeholder(str),  # of another run, whose images are taken; None: they are made
            through_unet=True,
            per_image=True,
            final='fresh',
            cutmix=True,
            cutmix_ratio='uniform',
            intermediate=False,
        )
    )
    # The student of the adversarial term; `steps` is ours, theirs are 20 epochs.
    config.in_loop = teach(epochs=1, batch_size=128, lr=0.1, final_lr=2e-4, kd_temperature=30.0)
    config.in_loop.update(kd_weight=1.0, weight_decay=5e-4)
    config.in_loop.every = 100  # images of a class; 0: there is none
    config.in_loop.start = 20  # images of a class from which it has a say
    config.in_loop.steps = 200
    config.distil = teach(epochs=240, batch_size=256, lr=0.2, milestones=(150, 180, 210))
    config.distil.update(kd_temperature=30.0, kd_weight=1.0)


def small_diffdfkd(config: ConfigDict) -> None:
    """DiffDFKD with a small diffusion model of pixels, for minutes of a CPU.  Ours."""
    config.prior.update(dtype='float32', remat=False, steps=20)
    config.loss.adversarial = 0.0
    config.synthesis.update(batch_size=64, per_class=512)
    config.distil.update(epochs=40, batch_size=128, milestones=())
    for recipe in (config.distil, config.in_loop):
        recipe.crop_padding, recipe.flip = config.teach.crop_padding, config.teach.flip
        recipe.kd_temperature = 4.0
    config.distil.save_every_epochs = 10


def generative(config: ConfigDict, student: str) -> None:
    """What DAFL, ZSKT, DFAD and DFQ share: the benchmark of CMI and Fast-DFKD, 200 epochs.

    Source: the scripts of the two repositories for CIFAR-10 (WRN-40-2 -> WRN-16-1) and the defaults
    of their drivers.  The student's adversary is that of Fast-DFKD's code, in eval mode.
    """
    config.student = ConfigDict(
        dict(
            model=student,
            optimiser='sgd',  # sgd / adam, with `momentum` for its first moment
            lr=0.1,
            final_lr=2e-4,
            momentum=0.9,
            weight_decay=1e-4,
            milestones=(),  # shares of the run after which rates are a tenth, in place of a cosine
            clip=0.0,  # the largest norm of a gradient, the generator's too; 0: any
        )
    )
    config.generator = ConfigDict(
        dict(
            model='dcgan_generator',
            latent=256,
            width=64,
            ending='pixels',  # pixels / norm
            lr=1e-3,
            beta1=0.5,
            beta2=0.999,
            decay=False,  # whether the rate falls as the student's does
        )
    )
    config.synthesis = ConfigDict(
        dict(
            batch_size=256,
            student_batch_size=256,
            fresh=True,  # latents at every step; else once a round
            adversary='eval',  # train / eval: the student; teacher: the benchmark's mistake
        )
    )
    config.phases = (phase(rounds=200 * 80, g_steps=1, s_steps=5),)


def benchmark(config: ConfigDict, method: str, student: str) -> None:
    """The settings under which the benchmark of CMI and Fast-DFKD runs four older methods.

    Source: as of `generative`.  Distillation is at temperature 1, as its code does and the methods'
    own do; its scripts say 20 (1 for DFAD), which the code overrides.
    """
    if method not in GENERATIVE:
        raise ValueError(f'benchmark is a setting of {", ".join(GENERATIVE)}, not of {method}.')
    with_losses = config.loss
    generative(config, student)
    if method == 'dafl':
        config.generator.latent = 512
        with_losses.update(one_hot=1.0, activation=1e-3, balance=20.0)
    elif method == 'dfq':
        dfq(config, student)
    else:
        with_losses.update(adversarial=1.0, kd=1.0, attention=0.0)


def dafl(config: ConfigDict, student: str) -> None:
    """DAFL at the authors' CIFAR-10 setting: 2,000 epochs of 120 batches of 1,024.

    Source: the README of their code (--oh 0.05 --ie 5 --act 0.01; --act is --a there) and its
    defaults.  Ours: latents of generator and student are drawn apart.
    """
    generative(config, student)
    config.student.update(weight_decay=5e-4, milestones=(0.4, 0.8))
    config.generator.update(latent=1000, ending='norm', lr=0.02, beta1=0.9)
    config.loss = ConfigDict(
        dict(
            one_hot=0.05,
            activation=0.01,
            balance=2.171,  # 5 / ln 10: the logarithm there has base 10
            kd=1.0,
            temperature=1.0,
        )
    )
    config.synthesis.update(batch_size=1024, student_batch_size=1024)
    config.phases = (phase(rounds=2000 * 120, g_steps=1, s_steps=1),)


def zskt(config: ConfigDict, student: str) -> None:
    """ZSKT at the authors' CIFAR-10 setting: 80,000 batches of 128, ten steps of the student each.

    Source: their script main0.sh.  Their divergence is a mean over classes too.
    """
    generative(config, student)
    config.student.update(optimiser='adam', lr=2e-3, final_lr=0.0, weight_decay=0.0, clip=5.0)
    config.generator.update(latent=100, ending='norm', beta1=0.9, decay=True)
    config.loss = ConfigDict(
        dict(
            discrepancy='kl',  # kl / l1
            adversarial=1 / config.data.num_classes,
            kd=1 / config.data.num_classes,
            attention=250.0,
            temperature=1.0,  # of the divergence, the generator's too
        )
    )
    config.synthesis.update(batch_size=128, student_batch_size=128, fresh=False, adversary='train')
    config.phases = (phase(rounds=80_000, g_steps=1, s_steps=10),)


def dfad(config: ConfigDict, student: str) -> None:
    """DFAD at the authors' CIFAR setting: 500 epochs of 50 rounds.

    Source: the README of their code (--scheduler) and its defaults.
    """
    generative(config, student)
    config.student.update(weight_decay=5e-4, milestones=(0.2, 0.4))
    config.generator.update(ending='norm', beta1=0.9, decay=True)
    config.loss = ConfigDict(
        dict(discrepancy='l1', adversarial=1.0, kd=1.0, attention=0.0, temperature=1.0)
    )
    config.synthesis.adversary = 'train'
    config.phases = (phase(rounds=500 * 50, g_steps=1, s_steps=5),)


def dfq(config: ConfigDict, student: str) -> None:
    """DFQ at the benchmark's setting, since its authors publish no code; 40 rounds an epoch.

    Source: as of `generative`.
    """
    generative(config, student)
    config.loss = ConfigDict(
        dict(adversarial=1.0, bn=1.0, one_hot=1.0, balance=20.0, kd=1.0, temperature=1.0)
    )
    config.phases = (phase(rounds=200 * 40, g_steps=1, s_steps=10),)


def noise(config: ConfigDict, student: str) -> None:
    """KD with noise images, for as long and at the rates that `generative` has.  Ours."""
    config.student = ConfigDict(
        dict(model=student, lr=0.1, final_lr=2e-4, momentum=0.9, weight_decay=1e-4)
    )
    config.loss = ConfigDict(dict(temperature=4.0))
    config.synthesis = ConfigDict(
        dict(
            batch_size=256,  # of synthesis, of which there is none
            student_batch_size=256,
        )
    )
    config.phases = (phase(rounds=200, g_steps=0, s_steps=400),)


def small_noise(config: ConfigDict, rounds: int) -> None:
    """KD with noise images for minutes of a CPU.  Ours."""
    config.synthesis.update(batch_size=128, student_batch_size=128)
    config.phases = (phase(rounds=rounds, g_steps=0, s_steps=20),)


def kd(config: ConfigDict, student: str) -> None:
    """Ordinary distillation on the real training images, as `teach` says: the upper bound."""
    config.student = ConfigDict(dict(model=student))


def small_generative(config: ConfigDict, method: str) -> None:
    """DAFL, ZSKT, DFAD or DFQ for minutes of a CPU.  Ours.

    A narrow generator, small batches, and for all but ZSKT the benchmark's setting: the rates of
    DAFL's authors belong to their batch.  The phases are the caller's.
    """
    if method != 'zskt':
        benchmark(config, method, config.student.model)
    config.generator.update(latent=64, width=16)
    config.synthesis.update(batch_size=128, student_batch_size=128)


def inverted(config: ConfigDict, student: str) -> None:
    """What DeepInversion, CMI and Fast-DFKD share: the benchmark of CMI and Fast-DFKD.

    Source: the CIFAR scripts of Fast-DFKD's repository and the defaults of its driver.  200 epochs
    of one batch of synthesis and 400 steps of the student; banks hold all that a run makes.
    """
    config.student = ConfigDict(
        dict(model=student, lr=0.1, final_lr=2e-4, momentum=0.9, weight_decay=1e-4)
    )
    config.synthesis = ConfigDict(
        dict(
            batch_size=256,
            student_batch_size=256,
            bank=200 * 256,
            crop_padding=4,
            flip=True,
            shade=0.0,  # as for cpsc; ours
            cutmix=0.0,
        )
    )


def deepinversion(config: ConfigDict, student: str) -> None:
    """DeepInversion as the benchmark of CMI and Fast-DFKD runs it, on every pair alike.

    Source: as of `inverted`.  Its table says 2,000 steps, its script has 1,000; CMI's script has
    `tv=1e-3`.  A quick variant there: `g_steps=10`, `lr=1`.
    """
    inverted(config, student)
    config.pixels = ConfigDict(
        dict(
            lr=0.1,
            beta1=0.5,
            beta2=0.99,
            jitter=config.data.image_size // 8,  # pixels that a batch is rolled by at the most
            keep='best',  # best / last; the published code keeps the last
        )
    )
    config.loss = ConfigDict(
        dict(
            bn=10.0,
            student_bn=1e-3,  # of the student's batch statistics, as a share of `bn`
            ce=1.0,
            adversarial=1.0,
            adversarial_temperature=3.0,
            tv=0.0,
            l2=0.0,
            temperature=20.0,
        )
    )
    config.phases = (phase(rounds=200, g_steps=1000, s_steps=400),)


def cmi(config: ConfigDict, student: str) -> None:
    """CMI as Fast-DFKD's benchmark runs it, on every pair alike.

    Source: as of `inverted`.  Its table says 500 steps, its script has 200.  CMI's own scripts have
    student batches of 128 and `contrast_temperature=0.1`; with images inverted before, `ce=0.5`.
    """
    inverted(config, student)
    config.generator = ConfigDict(
        dict(model='dcgan_generator', latent=256, width=64, lr=1e-3, beta1=0.5, beta2=0.999)
    )
    config.head = ConfigDict(dict(width=256, lr=1e-3))
    config.loss = ConfigDict(
        dict(
            bn=1.0,
            ce=1.0,
            adversarial=0.5,
            contrast=0.8,
            contrast_temperature=0.2,
            bn_momentum=0.0,
            temperature=20.0,
        )
    )
    config.synthesis.update(
        memory=40_960,  # images whose features are kept for the contrast
        negatives=4096,  # of them at a step
        local_area=0.25,  # the least share of an image that a local view shows
    )
    config.phases = (phase(rounds=200, g_steps=200, s_steps=400),)


def fast(config: ConfigDict, student: str) -> None:
    """Fast-DFKD with ten steps a batch (Fast-10), ResNet-34 -> ResNet-18; 220 epochs.

    Source: the script fast_cifar.sh of its repository, the same for CIFAR-10 and CIFAR-100.

        pair                                   adversarial  ce
        resnet34 -> resnet18                          1.33  0.5
        vgg11 -> resnet18                             1.0   0.5
        wrn40_2 -> wrn16_1, wrn40_1, wrn16_2          1.1   0.4

        g_steps (of both phases)  latent_lr    lr  meta_lr
        2                              .015  5e-3     1e-2
        5                               .01  3e-3   1.5e-2
        10                              .01  2e-3     2e-2
    """
    inverted(config, student)
    config.student.lr = 0.2
    config.generator = ConfigDict(
        dict(
            model='dcgan_generator',
            latent=256,
            width=64,
            meta='fomaml',  # fomaml / reptile / none: the last batch's generator goes on
            lr=2e-3,
            latent_lr=0.01,
            meta_lr=2e-2,  # `lr` times the steps of a batch
            beta1=0.5,
            beta2=0.999,
            reset_batch=140,  # before which the first layer is drawn anew; 0: never
        )
    )
    config.loss = ConfigDict(
        dict(bn=10.0, ce=0.5, adversarial=1.33, bn_momentum=0.9, temperature=20.0)
    )
    config.synthesis.bank = 220 * 256
    config.phases = (
        phase(rounds=20, g_steps=10, s_steps=0),
        phase(rounds=200, g_steps=10, s_steps=400),
    )


def small_inverted(config: ConfigDict, method: str) -> None:
    """Fast-DFKD, CMI or DeepInversion for minutes of a CPU.  Ours.

    A narrow generator, small batches and high rates.  The phases are the caller's.
    """
    config.student.lr = 0.2
    config.loss.temperature = 4.0
    config.synthesis.update(batch_size=128, student_batch_size=128)
    if method == 'fast':
        config.generator.update(latent=64, width=16, lr=1e-2, latent_lr=0.05, meta_lr=3e-2)
        config.generator.reset_batch = 0
        config.loss.update(bn=1.0, ce=1.0, adversarial=1.0)
    elif method == 'cmi':
        config.generator.update(latent=64, width=16, lr=1e-2)
        config.head.width = 64
        config.synthesis.update(memory=8 * 128, negatives=256)
    else:
        config.loss.bn = 1.0


def small_embeddings(config: ConfigDict, method: str) -> None:
    """NAYER or CAE-DFKD for minutes of a CPU.  Ours.

    A narrow generator, for the whole run, and small batches.  What pays most is a high rate: ten
    steps have to make images of a batch's noise.
    """
    if method == 'nayer':
        config.generator.update(noisy_width=64, life=1000)
    config.generator.update(width=16, lr=32e-3)
    config.loss.update(ce=1.0, adversarial=1.0, temperature=4.0)
    config.synthesis.update(batch_size=120, student_batch_size=128)


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
        config.phases = tuple(
            phase(rounds=2, g_steps=min(p.g_steps, 2), s_steps=min(p.s_steps, 2))
            for p in config.phases
        )
        if 'generator' in config:
            config.generator.width = min(config.generator.width, 16)
        config.synthesis.batch_size = config.synthesis.student_batch_size = 16
        for name, size in (('bank', 64), ('memory', 64), ('negatives', 32)):
            if name in config.synthesis:
                config.synthesis[name] = min(config.synthesis[name], size)
    config.teach.epochs = 1
    config.eval_batch_size = 100
    config.log_every_rounds = config.eval_every_rounds = config.save_every_rounds = 1


def finish(config: ConfigDict, flags: set[str]) -> ConfigDict:
    """Applies the flags every config knows."""
    if 'untrained' in flags:  # the control: the same run with a generator that never trains
        group = config.get('generator') or config.get('pixels')
        if group is None:
            raise ValueError(
                f'{config.method} trains no generator; diffdfkd has the controls unguided, noise.'
            )
        for rate in ('lr', 'latent_lr', 'meta_lr'):
            if rate in group:
                group[rate] = 0.0
    for source in ('unguided', 'noise'):
        if source in flags:
            if 'prior' not in config:
                raise ValueError(f'{source} is a control of diffdfkd; the others have untrained.')
            config.synthesis.source = source
    if 'smoke' in flags:
        smoke(config)
    return config
