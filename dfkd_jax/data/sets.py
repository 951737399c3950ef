"""The known data sets: their names, sizes and published constants, and how to get their files."""

from __future__ import annotations

from typing import NamedTuple


class Spec(NamedTuple):
    """A data set, as its authors and the papers on distillation describe it.

    mean, std: per channel, of images in [0, 1]; the constants that published teachers expect.
    flip, padding: the training augmentation that suits the images: whether to mirror them, and the
      padding of random crops in pixels.
    """

    tfds_name: str | None  # the official name; None: not read through tensorflow-datasets
    version: str | None  # the official version, which `prepare` writes
    num_classes: int
    channels: int
    image_size: int | None  # the side of the stored images, in pixels; None: they differ
    mean: tuple[float, ...]
    std: tuple[float, ...]
    test_split: str = 'test'  # the labelled images that accuracies are reported on
    flip: bool = True
    padding: int = 4
    class_names: tuple[str, ...] = ()  # (): those stored with the images


_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_FASHION_MNIST = (
    'T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat',
    'Sandal', 'Shirt', 'Sneaker', 'Bag', 'Ankle boot',
)  # fmt: skip

_CIFAR10 = tuple('airplane automobile bird cat deer dog frog horse ship truck'.split())

_CIFAR100 = tuple(
    """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly
    camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile
    cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp
    lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom
    oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
    possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake
    spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor
    train trout tulip turtle wardrobe whale willow_tree wolf woman worm
    """.split()
)

# The constants come from the PyTorch code that trained the published teachers.  CPSC-DFKD, CMI,
# NAYER and DiffDFKD share those of CIFAR.  CPSC-DFKD gives Tiny-ImageNet those of ImageNet; NAYER
# has 0.5 and 0.5.  Fashion-MNIST's are the moments of its training images.
DATASETS: dict[str, Spec] = {
    'digits': Spec(
        None, None, 10, 1, 8,
        (0.5,), (0.5,),  # ours: none are published
        flip=False, padding=1, class_names=tuple('0123456789'),
    ),
    'fashion_mnist': Spec(
        'fashion_mnist', '3.0.1', 10, 1, 28,
        (0.2860,), (0.3530,),
        padding=2, class_names=_FASHION_MNIST,
    ),
    'cifar10': Spec(
        'cifar10', '3.0.2', 10, 3, 32,
        (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010),
        class_names=_CIFAR10,
    ),
    'cifar100': Spec(
        'cifar100', '3.0.2', 100, 3, 32,
        (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761),
        class_names=_CIFAR100,
    ),
    # Not in tensorflow-datasets: `prepare` makes it from the published folder.
    'tiny_imagenet': Spec(
        'tiny_imagenet', '1.0.0', 200, 3, 64,
        _IMAGENET_MEAN, _IMAGENET_STD,
        test_split='validation',
    ),
    # The ten classes of DiffDFKD, of one domain; `prepare` makes it from a folder.
    'domainnet': Spec(
        'domainnet_10', '1.0.0', 10, 3, None,
        (0.5,) * 3, (0.5,) * 3,
        class_names=tuple(
            'airplane axe basketball bicycle bird bracelet clock flower pizza strawberry'.split()
        ),
    ),
    'imagenet': Spec(
        'imagenet2012', '5.1.0', 1000, 3, None,
        _IMAGENET_MEAN, _IMAGENET_STD,
        test_split='validation',
    ),
}  # fmt: skip


def spec_of(name: str) -> Spec | None:
    """The entry for a name, ours or TFDS's ('imagenet', 'imagenet2012'); None if not listed."""
    by_official_name = {spec.tfds_name: spec for spec in DATASETS.values() if spec.tfds_name}
    return DATASETS.get(name) or by_official_name.get(name)


def how_to_prepare(name: str, data_dir: str) -> str:
    """The commands that put a data set into `data_dir`, indented, one on each line."""
    command = f'  python -m dfkd_jax.data prepare {name} --data_dir={data_dir}'
    tensorflow = "  pip install 'dfkd_jax[tensorflow]'\n"
    if name == 'fashion_mnist':
        return (
            f'  apt-get install -y dataset-fashion-mnist\n{command}\n'
            'or, with the four IDX files of its authors in FOLDER:\n'
            f'{command} --source=FOLDER'
        )
    if name in ('cifar10', 'cifar100'):
        folder = {'cifar10': 'cifar-10-batches-bin', 'cifar100': 'cifar-100-binary'}[name]
        archive = {'cifar10': 'cifar-10-python.tar.gz', 'cifar100': 'cifar-100-python.tar.gz'}[name]
        return (
            f'{tensorflow}{command}\n'
            f'or, without TensorFlow, from the unpacked binary version ({folder}) of its authors:\n'
            f'{command} --source={folder}\n'
            f'or from their python version, in its archive or unpacked:\n'
            f'{command} --source={archive}'
        )
    if name == 'tiny_imagenet':
        return f'with the folder of tiny-imagenet-200.zip:\n{command} --source=tiny-imagenet-200'
    if name == 'domainnet':
        return (
            'with the ten classes of one domain, as train/CLASS/* and test/CLASS/* in FOLDER:\n'
            f'{command} --source=FOLDER'
        )
    if name in ('imagenet', 'imagenet2012'):
        return (
            'with the images, which you request at https://image-net.org/download-images,\n'
            'as train/CLASS/*.JPEG and val/CLASS/*.JPEG in FOLDER (val/ alone is enough to measure '
            'on):\n'
            f'{command} --source=FOLDER\n'
            'or, with ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar in FOLDER:\n'
            f'{tensorflow}{command} --source=FOLDER'
        )
    return f'with a folder of class folders of images:\n{command} --source=FOLDER'
