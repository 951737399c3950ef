"""What steps are compared to: golden files, and plain PyTorch in float64.

The golden gradients are those of float32, where rounding decides on which side of its kink a ReLU
of ten million is: one such unit changes a gradient by up to a hundredth of its largest entry.  In
float64 none is so near, so gradients are held to PyTorch's there, and values to the golden ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dfkd_jax import models, port

KINKS = 5e-3  # how far float32 takes a golden gradient from that of float64


def near(actual: Any, expected: np.ndarray, what: str, tolerance: float = 1e-4) -> None:
    """Relative to the largest value expected."""
    atol = tolerance * np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol, err_msg=what)


def identical(actual: Any, expected: Any) -> None:
    """The same tree, dtypes and bits."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def last(x: np.ndarray) -> np.ndarray:
    """Channels last."""
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1))


def weights(rule: Any, name: str, *inputs: Any, prefix: str = '', **sizes: Any) -> dict[str, Any]:
    """The golden files' weights of the model called `name`, as PyTorch names them.

    inputs: what the model is called with.
    """
    module = models.make(name, **sizes)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
    named = {key: x.shape for key, x in port.to_torch(name, zeros).items()}
    return rule.state_dict(named.items(), prefix)


@contextlib.contextmanager
def float64() -> Iterator[None]:
    """Within, arrays may be float64, which float32 constants of the library are promoted to.

    Convolutions in float64 take ten times longer in programs that are not optimised.
    """
    name = 'jax_disable_most_optimizations'
    before = jax.config.values[name]
    jax.config.update(name, False)
    try:
        with jax.enable_x64(True), jax.numpy_dtype_promotion('standard'):
            yield
    finally:
        jax.config.update(name, before)


def wide(tree: Any) -> Any:
    """A tree of arrays in float64."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), tree)


def torch_named(name: str, params: Any, variables: dict[str, Any]) -> dict[str, np.ndarray]:
    """Parameters, or their gradients, of a model under PyTorch's names and in its layout."""
    params = jax.device_get(params)
    return port.to_torch(name, {'params': params, 'batch_stats': variables['batch_stats']})


def near_gradients(actual: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    """Weight by weight, relative to its largest entry.

    The gradient of a bias that a batch norm cancels is rounding error: it is compared as if its
    largest entry were a millionth of the network's.
    """
    largest = max(np.abs(x).max() for x in expected.values())
    for name, x in expected.items():
        atol = tolerance * max(np.abs(x).max(), 1e-6 * largest)
        np.testing.assert_allclose(actual[name], x, rtol=0, atol=atol, err_msg=name)


def torch_network(module: Any, arrays: dict[str, np.ndarray], train: bool = False) -> Any:
    """A PyTorch module with these weights, in float64."""
    import torch

    module.load_state_dict({key: torch.as_tensor(x) for key, x in arrays.items()})
    return module.double().train(train)


def torch_gradient(value: Any, network: Any) -> dict[str, np.ndarray]:
    """The gradient of a scalar with respect to the parameters of a network, by their names."""
    import torch

    names, parameters = zip(*network.named_parameters(), strict=True)
    found = torch.autograd.grad(value, parameters, retain_graph=True)
    return {name: gradient.numpy() for name, gradient in zip(names, found, strict=True)}
