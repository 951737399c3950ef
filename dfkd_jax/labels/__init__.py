"""Label-text embeddings: what a generator knows of a class beside its number.

`table` loads or makes the embeddings of a data set's classes, `names` makes the texts, and
`encoders` are the text encoders.
"""

from dfkd_jax.errors import LabelError as LabelError
from dfkd_jax.labels.names import class_names as class_names
from dfkd_jax.labels.names import sentences as sentences
from dfkd_jax.labels.table import Settings as Settings
from dfkd_jax.labels.table import load as load
from dfkd_jax.labels.table import settled as settled
from dfkd_jax.labels.table import standardise as standardise
