"""The methods: names to functions ``make(config, models, shards) -> Method``."""

from dfkd_jax.methods import (
    cae,
    cmi,
    cpsc,
    dafl,
    deepinversion,
    dfq,
    diffdfkd,
    fast,
    nayer,
    noise,
    spaceshipnet,
    zskt,
)

METHODS = {
    'cae': cae.make,
    'cmi': cmi.make,
    'cpsc': cpsc.make,
    'dafl': dafl.make,
    'deepinversion': deepinversion.make,
    'dfad': zskt.make,
    'dfq': dfq.make,
    'diffdfkd': diffdfkd.make,
    'fast': fast.make,
    'nayer': nayer.make,
    'noise': noise.make,
    'spaceshipnet': spaceshipnet.make,
    'zskt': zskt.make,
}
