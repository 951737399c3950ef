"""The methods: names to functions ``make(config, models, shards) -> Method``."""

from dfkd_jax.methods import cae, cpsc, dafl, dfq, diffdfkd, nayer, noise, zskt

METHODS = {
    'cae': cae.make,
    'cpsc': cpsc.make,
    'dafl': dafl.make,
    'dfad': zskt.make,
    'dfq': dfq.make,
    'diffdfkd': diffdfkd.make,
    'nayer': nayer.make,
    'noise': noise.make,
    'zskt': zskt.make,
}
