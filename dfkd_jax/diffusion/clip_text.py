"""CLIP's text encoder (Radford et al. 2021), as transformers' CLIPTextModel."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from dfkd_jax.diffusion.fields import DEPTH, whole
from dfkd_jax.diffusion.layers import attention, layer_norm
from dfkd_jax.errors import DiffusionError
from dfkd_jax.models import layers
from dfkd_jax.models.layers import Array, Dtype

NAMES = ('q_proj', 'k_proj', 'v_proj', 'out_proj')


def quick_gelu(x: Array) -> Array:
    """The approximation of GELU that OpenAI's CLIP was trained with."""
    return x * nn.sigmoid(1.702 * x)


def gelu(x: Array) -> Array:
    """The exact GELU, of OpenCLIP."""
    return nn.gelu(x, approximate=False)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {'quick_gelu': quick_gelu, 'gelu': gelu}


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """An architecture.  Every text is padded to `length` tokens."""

    vocabulary: int
    length: int
    width: int
    hidden: int
    depth: int
    heads: int
    activation: str
    epsilon: float


class CLIPText(nn.Module):
    """From tokens to the normalised states of the last layer."""

    config: TextConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        """Tokens [B, L] int32 -> [B, L, width] float32; no state sees a later token."""
        config = self.config
        # N(0, 0.02), as in transformers; a text encoder is never trained here.
        init = nn.initializers.normal(0.02)

        def embed(number: int, name: str, tokens: Array) -> Array:
            table = nn.Embed(number, config.width, embedding_init=init, dtype=self.dtype, name=name)
            return table(tokens)

        x = embed(config.vocabulary, 'token_embedding', tokens)
        positions = jnp.arange(tokens.shape[1])
        x = x + embed(config.length, 'position_embedding', positions)[None]
        for i in range(config.depth):
            x = TextLayer(config, self.dtype, name=f'layers_{i}')(x)
        x = layer_norm(x, config.epsilon, name='final_layer_norm', dtype=self.dtype)
        return x.astype(jnp.float32)


class TextLayer(nn.Module):
    """Causal self-attention and a two-layer network, each on normalised states and residual."""

    config: TextConfig
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        config, dtype = self.config, self.dtype
        y = layer_norm(x, config.epsilon, name='layer_norm1', dtype=dtype)
        x = x + CausalAttention(config.heads, dtype, name='self_attn')(y)
        y = layer_norm(x, config.epsilon, name='layer_norm2', dtype=dtype)
        return x + MLP(config.hidden, config.activation, dtype, name='mlp')(y)


class CausalAttention(nn.Module):
    """`layers.attention` of every token to itself and to the tokens before it."""

    heads: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return attention(x, x, self.heads, names=NAMES, causal=True, dtype=self.dtype)


class MLP(nn.Module):
    """Two linear layers."""

    hidden: int
    activation: str
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = layers.linear(x, self.hidden, name='fc1', dtype=self.dtype)
        y = ACTIVATIONS[self.activation](y)
        return layers.linear(y, x.shape[-1], name='fc2', dtype=self.dtype)


def from_config(config: Mapping[str, Any], where: str = 'config.json') -> TextConfig:
    """The architecture of a transformers configuration, as in text_encoder/config.json.

    Raises:
      DiffusionError: for a class or an activation that is not supported, or a field that is
        missing or makes no sense.
    """
    names = config.get('architectures') or [config.get('_class_name')]
    if list(names) != ['CLIPTextModel']:
        raise DiffusionError(f'{where} is of {names}: expected architectures=["CLIPTextModel"].')
    activation = config.get('hidden_act', 'quick_gelu')
    if activation not in ACTIVATIONS:
        raise DiffusionError(
            f'{where} has hidden_act={activation!r}: expected {" or ".join(ACTIVATIONS)}.'
        )
    width, heads = whole(config, 'hidden_size', where), whole(config, 'num_attention_heads', where)
    if width % heads:
        raise DiffusionError(
            f'{where} has hidden_size={width} and num_attention_heads={heads}: expected heads that '
            'divide the size.'
        )
    return TextConfig(
        vocabulary=whole(config, 'vocab_size', where),
        length=whole(config, 'max_position_embeddings', where),
        width=width,
        hidden=whole(config, 'intermediate_size', where),
        depth=whole(config, 'num_hidden_layers', where, DEPTH),
        heads=heads,
        activation=activation,
        epsilon=float(config.get('layer_norm_eps', 1e-5)),
    )
