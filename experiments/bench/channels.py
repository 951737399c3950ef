"""Compares `layers.convolve_channels` with XLA's grouped convolution, in whole networks.

    python experiments/bench/channels.py > experiments/bench/channels.csv

Milliseconds, best of four alternating turns, of a forward pass, its image gradient and a training
pass; seconds of compilation.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
import ours

from dfkd_jax import models
from dfkd_jax.models import layers

WAYS = {'in groups': jax.lax.conv_general_dilated, 'products': layers.convolve_channels}


def passes(name: str, size: int, batch: int) -> dict[str, tuple[ours.Program, tuple]]:
    """The three programs of a network, with their arguments."""
    module = models.make(name)
    images = jax.random.normal(jax.random.key(0), (batch, size, size, 3))
    variables = jax.jit(module.init)(jax.random.key(1), images[:1])

    def loss(variables: Any, images: jax.Array, train: bool = False) -> jax.Array:
        out = module.apply(variables, images, train=train, mutable=['batch_stats'])[0]
        return jnp.sum(jnp.square(out.logits))

    def training(params: Any, stats: Any, images: jax.Array) -> jax.Array:
        return loss({'params': params, 'batch_stats': stats}, images, train=True)

    whole = (variables, images)
    parts = {
        'forward': (loss, whole),
        'image gradient': (jax.grad(loss, 1), whole),
        'training': (jax.grad(training), (variables['params'], variables['batch_stats'], images)),
    }
    return {
        k: (ours.compile_program(jax.jit(fn), *given), given) for k, (fn, given) in parts.items()
    }


def main() -> None:
    print('network,px,batch,pass,way,ms,compilation_s')
    for name, size, batch in (('mobilenetv2', 32, 64), ('efficientnet_lite0', 224, 4)):
        made = {}
        for way, convolution in WAYS.items():
            layers.convolve_channels = convolution
            made[way] = passes(name, size, batch)
        for kind in ('forward', 'image gradient', 'training'):
            best = dict.fromkeys(made, float('inf'))
            for _ in range(4):
                for way, programs in made.items():
                    program, given = programs[kind]
                    started = time.perf_counter()
                    jax.block_until_ready(program.call(*given))
                    best[way] = min(best[way], time.perf_counter() - started)
            for way, programs in made.items():
                seconds = programs[kind][0].seconds
                print(
                    name, size, batch, kind, way, round(1e3 * best[way]), round(seconds, 1), sep=','
                )


if __name__ == '__main__':
    main()
