"""The methods: names to functions ``make(config, models, shards) -> Method``."""

from dfkd_jax.methods import cpsc

METHODS = {
    'cpsc': cpsc.make,
}
