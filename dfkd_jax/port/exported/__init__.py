"""Networks of any architecture, from files that other libraries export.

    module, variables = load_exported('teacher.pt2')   # torch.export
    module, variables = load_exported('teacher.onnx')
    out = module.apply(variables, images)               # images [B, H, W, C], `models.Output`

`pt2.py` and `onnx_file.py` read a file into a `program.Program`, `aten.py` and `onnx_operators.py`
are their tables of operators, `layers.py` is what both compute with, and `module.py` runs it.
Nothing of a file is executed or unpickled.
"""

from __future__ import annotations

import hashlib
import logging
import os
from typing import Any

from dfkd_jax.errors import PortError
from dfkd_jax.port.exported import module, onnx_file, pt2
from dfkd_jax.port.exported.module import Exported
from dfkd_jax.port.exported.program import Program
from dfkd_jax.storage import files, safe_read

ENDINGS = ('.pt2', '.onnx')


def load_exported(path: str | os.PathLike[str]) -> tuple[Exported, dict[str, Any]]:
    """The classifier in a `.pt2` or `.onnx` file, as a module, and its variables.

    Returns:
      module: has `apply(variables, images) -> models.Output` for images [B, H, W, C] of any batch
        size, which can be compiled and differentiated, and `clone(axis_name=..., dtype=...)`.
        `features` are the input of the last linear layer, or the mean over pixels of that of a last
        convolution.  `statistics` are empty for a network without batch norms.
      variables: ``{'params': ..., 'batch_stats': ...}`` of float32 NumPy arrays.

    Warns, by `logging`, of a file whose batch norms were folded into convolutions, and of a softmax
    at the end, which is left out.

    Raises:
      PortError: for a file that is missing, damaged, hostile or of another version; for operators
        that are not read, all at once; for one exported in training mode or for one batch size.
    """
    path = files.expanded(path)
    if not path.is_file():
        raise PortError(f'there is no file {path}: check the path.')
    try:
        safe_read.check_archive(path)
        with open(path, 'rb') as file:
            digest = hashlib.file_digest(file, 'sha256').hexdigest()
            file.seek(0)
            first = file.read(4)
    except (OSError, ValueError) as error:
        raise PortError(f'{path} cannot be read: {error}.') from error
    packed = first == b'PK\x03\x04'
    if not packed and path.suffix.lower() != '.onnx':
        raise PortError(
            f'{path} is no exported network: expected .pt2, of torch.export.save, or .onnx.'
        )
    program = pt2.read(path, digest) if packed else onnx_file.read(path, digest)
    _warn_of_folding(program)
    return module.build(program)


def _warn_of_folding(program: Program) -> None:
    """Says so if the file has convolutions and normalises nowhere: exporters fold batch norms."""
    operators = [program.dialect.base(node.operator) for node in program.nodes]
    convolutions = sum(name in program.dialect.convolutions for name in operators)
    normalising = program.dialect.norms | program.dialect.other_norms
    if convolutions < 2 or normalising.intersection(operators):
        return
    how = pt2.EXPORT if program.dialect is pt2.aten.DIALECT else onnx_file.EXPORT
    logging.warning(
        '%s has no batch norms, so it has no statistics: it classifies, and config.loss.bn drops '
        'out. If the network has some, the exporter folded them into its convolutions; this keeps '
        'them: %s.',
        program.source,
        how,
    )
