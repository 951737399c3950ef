"""The groups of a config that several modules read.

A config is an `ml_collections.ConfigDict` made by a file of ``configs/``.  These protocols name the
fields of its shared groups.  The fields that a method reads are in ``configs/methods/NAME.py``.
"""

from __future__ import annotations

from typing import Any, Protocol


class DataConfig(Protocol):
    """`config.data`: the images, and how the networks see them."""

    name: str
    data_dir: str | None  # None: $TFDS_DATA_DIR, else ~/tensorflow_datasets
    num_classes: int
    image_size: int  # pixels a side
    channels: int
    resize: str  # pad / resize / crop
    mean: tuple[float, ...] | None  # of images in [0, 1]; None: the published values
    std: tuple[float, ...] | None


class PhaseConfig(Protocol):
    """One of `config.phases`: rounds of `loops` batches of synthesis, then student steps."""

    rounds: int
    loops: int  # batches of synthesis in a round
    g_steps: int  # generator steps in a batch of synthesis
    s_steps: int  # student steps in a round


class TrainingConfig(Protocol):
    """`config.teach`, and the same group for a student that learns from stored images."""

    epochs: int
    batch_size: int
    lr: float
    final_lr: float
    warmup_epochs: float
    milestones: tuple[int, ...]  # epochs that divide the rate by ten, instead of the cosine
    momentum: float
    nesterov: bool
    weight_decay: float
    crop_padding: int  # pixels
    random_resized_crop: bool
    flip: bool
    shade: float
    cutmix: float
    kd_temperature: float
    kd_weight: float  # w in w KD + (1 - w) CE
    save_every_epochs: int
    eval_every_epochs: int

    def __getitem__(self, name: str) -> Any: ...


class LabelsConfig(Protocol):
    """`config.labels`: the embeddings of the class names."""

    source: str  # table / minilm / clip / onehot
    path: str | None
    text: str  # names / index
    prompt: str
    standardise: bool


class PriorConfig(Protocol):
    """`config.prior`: a pretrained diffusion model, and how it is sampled."""

    path: str | None  # a folder in diffusers' format, or the name of a prior that ships
    dtype: str  # float32 / bfloat16
    remat: bool
    steps: int
    scale: float  # of classifier-free guidance
    prompt: str
    negative: str


class DistributedConfig(Protocol):
    """`config.distributed`: several processes as one run."""

    coordinator: str  # HOST:PORT
    num_processes: int
    process_id: int
    auto: bool
    join_seconds: float
    silent_seconds: float

    def __getitem__(self, name: str) -> Any: ...
