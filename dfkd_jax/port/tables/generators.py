"""The generators of the papers, by the names that their repositories give them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from dfkd_jax.port.rules import CLASS_TABLES, CONV, LINEAR, NOISY, NORM, STATISTICS, Row, Table


def _latents(module: Any, channels: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    del channels
    return (jax.ShapeDtypeStruct((1, module.latent), jnp.float32),)


def _latents_and_labels(module: Any, channels: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    return (*_latents(module, channels), jax.ShapeDtypeStruct((1,), jnp.int32))


def _embeddings(module: Any, channels: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    del channels
    return (jax.ShapeDtypeStruct((1, module.embedding), jnp.float32),)


CPSC = Table(
    rows=(
        Row('l1.0', 'project', LINEAR),
        Row('conv_blocks0_0', 'norm0/norm', STATISTICS),
        Row('conv_blocks0_0', 'norm0', CLASS_TABLES),
        Row('conv_blocks3_2', 'norm3/norm', STATISTICS),
        Row('conv_blocks3_2', 'norm3', CLASS_TABLES),
        Row('conv_blocks{i}_1', 'norm{i}/norm', STATISTICS),
        Row('conv_blocks{i}_1', 'norm{i}', CLASS_TABLES),
        Row('conv_blocks{i}_0', 'conv{i}', CONV),
    ),
    first='',
    last='',
    inputs=_latents_and_labels,
)

CPSC_DEEP = Table(
    rows=(
        Row('project.1', 'project', LINEAR),
        Row('conv_blocks0_0', 'norm0/norm', STATISTICS),
        Row('conv_blocks0_0', 'norm0', CLASS_TABLES),
        Row('conv_blocks{i}_1', 'norm{i}/norm', STATISTICS),
        Row('conv_blocks{i}_1', 'norm{i}', CLASS_TABLES),
        Row('conv_blocks{i}_0', 'conv{i}', CONV),
    ),
    first='',
    last='',
    inputs=_latents_and_labels,
)

DCGAN = Table(
    rows=(
        Row('l1.0', 'project', LINEAR),
        Row('conv_blocks.0', 'norm0', NORM),
        Row('conv_blocks.2', 'conv1', CONV),
        Row('conv_blocks.3', 'norm1', NORM),
        Row('conv_blocks.6', 'conv2', CONV),
        Row('conv_blocks.7', 'norm2', NORM),
        Row('conv_blocks.9', 'conv3', CONV),
    ),
    first='',
    last='',
    inputs=_latents,
)

NAYER = Table(
    rows=(Row('n1', 'n1', NORM), Row('le1.{i}', '', NOISY), *DCGAN.rows),
    first='',
    last='',
    inputs=_embeddings,
)

# The trunk for 224 px: like DCGAN, but a convolution and a norm follow each upsampling.
DCGAN_DEEP = Table(
    rows=(
        Row('l1.0', 'project', LINEAR),
        Row('conv_blocks.0', 'conv0', CONV),
        Row('conv_blocks.1', 'norm0', NORM),
        Row('conv_blocks.4', 'conv1', CONV),
        Row('conv_blocks.5', 'norm1', NORM),
        Row('conv_blocks.8', 'conv2', CONV),
        Row('conv_blocks.9', 'norm2', NORM),
        Row('conv_blocks.12', 'conv3', CONV),
        Row('conv_blocks.13', 'norm3', NORM),
        Row('conv_blocks.16', 'conv4', CONV),
        Row('conv_blocks.17', 'norm4', NORM),
        Row('conv_blocks.19', 'conv5', CONV),
    ),
    first='',
    last='',
    inputs=_latents,
)

NAYER_DEEP = Table(
    rows=(Row('n1', 'n1', NORM), Row('le1.{i}', '', NOISY), *DCGAN_DEEP.rows),
    first='',
    last='',
    inputs=_embeddings,
)

TABLES = {
    'cpsc_generator': (CPSC,),
    'cpsc_deep_generator': (CPSC_DEEP,),
    'dcgan_generator': (DCGAN,),
    'dcgan_deep_generator': (DCGAN_DEEP,),
    'nayer_generator': (NAYER,),
    'nayer_deep_generator': (NAYER_DEEP,),
}
