"""LiteRT (TensorFlow Lite), where its converter is installed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from dfkd_jax.deploy.card import Card
from dfkd_jax.deploy.student import function
from dfkd_jax.distributed import sharding
from dfkd_jax.errors import DeployError

INSTALL = (
    "in an environment of its own, pip install 'litert-converter==0.5.0' dfkd_jax, and run the "
    'same command there'
)


def convert(card: Card, variables: Any, inputs: list[str], outputs: list[str]) -> bytes:
    """The student as a LiteRT model of one image: pixels [1, H, W, channels] uint8.

    It has one signature, ``serving_default``, with these names.
    Raises DeployError where the converter is not installed or cannot convert the network.
    """
    try:
        from litert_converter import converter_api_ext as api
        from litert_converter.mlir import ir, passmanager
    except ImportError as error:
        raise DeployError(
            f'LiteRT needs the package litert-converter, whose pins do not go with others: '
            f'{INSTALL}. Or export ONNX, from which other converters start.'
        ) from error
    text = _stablehlo(card, variables)
    try:
        with ir.Context() as context, ir.Location.unknown():
            api.prepare_mlir_context(context)
            module = ir.Module.parse(text)
            api.set_signature(module.operation, 'serving_default', inputs, outputs)
            passes = passmanager.PassManager()
            api.run_convert_to_tfl_passes(module, passes, api.ConvertToTFLConfig())
            return api.export_flatbuffer_to_bytes(module.operation)
    except Exception as error:  # MLIR raises a type of its own
        raise DeployError(f'LiteRT cannot take this network ({error}).') from error


def _stablehlo(card: Card, variables: Any) -> str:
    """The program as text.

    Of TPUs, whose way of computing a convolution of each channel is a convolution; that of CPUs is
    a sum of products, which LiteRT would not know for one.
    """
    fn = function(card)
    fixed: Any = sharding.make('jit').call(lambda pixels: fn(variables, pixels))
    pixels = jax.ShapeDtypeStruct((1, *card.image_shape), jnp.uint8)
    return jax.export.export(fixed, platforms=('tpu',))(pixels).mlir_module()
