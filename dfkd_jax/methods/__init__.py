"""The methods: names to functions ``make(config, models, shards) -> Method``."""

from dfkd_jax.methods import cae, cpsc, diffdfkd, nayer

METHODS = {
    'cae': cae.make,
    'cpsc': cpsc.make,
    'diffdfkd': diffdfkd.make,
    'nayer': nayer.make,
}
