"""Real images for teachers and for measuring; the synthetic images that a run keeps on disk.

`loading` reads data sets, `sets` lists what is known of each, `prepare` writes them, `image_folder`
reads plain folders of images, and `synthetic` keeps a bank of synthetic images.
"""

from dfkd_jax.data.loading import IN_MEMORY_BYTES as IN_MEMORY_BYTES
from dfkd_jax.data.loading import RESIZE as RESIZE
from dfkd_jax.data.loading import Batch as Batch
from dfkd_jax.data.loading import Dataset as Dataset
from dfkd_jax.data.loading import Facts as Facts
from dfkd_jax.data.loading import Settings as Settings
from dfkd_jax.data.loading import absence as absence
from dfkd_jax.data.loading import check as check
from dfkd_jax.data.loading import data_folder as data_folder
from dfkd_jax.data.loading import denormalise as denormalise
from dfkd_jax.data.loading import find as find
from dfkd_jax.data.loading import fit_image as fit_image
from dfkd_jax.data.loading import identity as identity
from dfkd_jax.data.loading import load as load
from dfkd_jax.data.loading import normalise as normalise
from dfkd_jax.data.sets import DATASETS as DATASETS
from dfkd_jax.data.sets import Spec as Spec
from dfkd_jax.data.sets import spec_of as spec_of
