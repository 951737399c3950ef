"""LiteRT (TensorFlow Lite), where its converter is installed."""

from __future__ import annotations

from typing import Any

from dfkd_jax.deploy.card import Card
from dfkd_jax.errors import DeployError


def convert(card: Card, variables: Any) -> bytes:
    """The student as a LiteRT model."""
    raise DeployError('TODO')
