"""Label-text embeddings: what a generator knows of a class beside its number."""

from dfkd_jax.errors import LabelError as LabelError
from dfkd_jax.labels.names import class_names as class_names
from dfkd_jax.labels.names import sentences as sentences
from dfkd_jax.labels.table import load as load
from dfkd_jax.labels.table import standardise as standardise
