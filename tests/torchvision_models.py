"""torchvision's networks, which the model zoo is held to."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

_declared: list[Any] = []  # operators live as long as the library that they are declared in


def load() -> Any:
    """`torchvision.models`; skips the test where there is no torchvision.

    A torchvision that was built for another PyTorch than the one installed (for CUDA, beside one
    for CPUs) fails at import: it looks up two operators of its compiled part, which no network here
    needs.  There, their signatures alone are declared.
    """
    torch = pytest.importorskip('torch', reason='PyTorch computes the reference')
    if importlib.util.find_spec('torchvision') is None:
        pytest.skip('`pip install torchvision` provides the networks that this test compares to')
    try:
        import torchvision
    except RuntimeError as error:
        if 'torchvision::nms' not in str(error):
            raise
        _declared.append(torch.library.Library('torchvision', 'DEF'))
        _declared[0].define('nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
        _declared[0].define('qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
        import torchvision
    return torchvision.models
