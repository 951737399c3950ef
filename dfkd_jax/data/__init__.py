"""Images: real ones, for teachers and for measuring, and the synthetic ones that a run keeps."""

from dfkd_jax.data.loading import EVERY as EVERY
from dfkd_jax.data.loading import IN_MEMORY_BYTES as IN_MEMORY_BYTES
from dfkd_jax.data.loading import RESIZE as RESIZE
from dfkd_jax.data.loading import Batch as Batch
from dfkd_jax.data.loading import Dataset as Dataset
from dfkd_jax.data.loading import Facts as Facts
from dfkd_jax.data.loading import check as check
from dfkd_jax.data.loading import denormalise as denormalise
from dfkd_jax.data.loading import find as find
from dfkd_jax.data.loading import load as load
from dfkd_jax.data.loading import normalise as normalise
from dfkd_jax.data.sets import DATASETS as DATASETS
from dfkd_jax.data.sets import Spec as Spec
from dfkd_jax.data.sets import spec_of as spec_of
from dfkd_jax.errors import DataError as DataError
