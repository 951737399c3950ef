"""The methods: names to functions ``make(config, models, shards) -> Method``."""

from dfkd_jax.methods import cae, cpsc, nayer

METHODS = {
    'cae': cae.make,
    'cpsc': cpsc.make,
    'nayer': nayer.make,
}
