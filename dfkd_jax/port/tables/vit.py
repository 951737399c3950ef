"""Vision transformers: the names of timm, which are DeiT's too, and of torchvision."""

from __future__ import annotations

from dfkd_jax.port.rules import AFFINE, CONV, LINEAR, Leaf, Row, Table

TIMM = Table(
    rows=(
        Row('', '', (Leaf('cls_token', 'params', 'cls_token'),)),
        Row('', '', (Leaf('pos_embed', 'params', 'pos_embed'),)),
        Row('patch_embed.proj', 'patch_embed', CONV),
        Row('blocks.{i}.norm{n}', 'blocks_{i}/norm{n}', AFFINE),
        Row('blocks.{i}.attn.qkv', 'blocks_{i}/attn/qkv', LINEAR),
        Row('blocks.{i}.attn.proj', 'blocks_{i}/attn/proj', LINEAR),
        Row('blocks.{i}.mlp.fc{n}', 'blocks_{i}/fc{n}', LINEAR),
        Row('norm', 'norm', AFFINE),
        Row('head', 'head', LINEAR),
    ),
    first='patch_embed.proj.weight',
    last='head.weight',
)

# torch.nn.MultiheadAttention's, which stacks query, key and value as timm does.
IN_PROJ = (
    Leaf('in_proj_weight', 'params', 'kernel', (1, 0)),
    Leaf('in_proj_bias', 'params', 'bias'),
)
LAYER = 'encoder.layers.encoder_layer_{i}'
TORCHVISION = Table(
    rows=(
        Row('', '', (Leaf('class_token', 'params', 'cls_token'),)),
        Row('encoder', '', (Leaf('pos_embedding', 'params', 'pos_embed'),)),
        Row('conv_proj', 'patch_embed', CONV),
        Row(f'{LAYER}.ln_{{n}}', 'blocks_{i}/norm{n}', AFFINE),
        Row(f'{LAYER}.self_attention', 'blocks_{i}/attn/qkv', IN_PROJ),
        Row(f'{LAYER}.self_attention.out_proj', 'blocks_{i}/attn/proj', LINEAR),
        # The two linear layers, with GELU and dropout between and after them.
        Row(f'{LAYER}.mlp.0', 'blocks_{i}/fc1', LINEAR),
        Row(f'{LAYER}.mlp.3', 'blocks_{i}/fc2', LINEAR),
        Row('encoder.ln', 'norm', AFFINE),
        Row('heads.head', 'head', LINEAR),
    ),
    first='conv_proj.weight',
    last='heads.head.weight',
)

# timm publishes Ti and S, torchvision B: each is written with the names it is known by.
TABLES = {
    **dict.fromkeys(
        ('vit_tiny', 'vit_small', 'vit_tiny_cifar', 'vit_mini_cifar'), (TIMM, TORCHVISION)
    ),
    'vit_base': (TORCHVISION, TIMM),
}
