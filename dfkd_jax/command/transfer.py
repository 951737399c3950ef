"""`dfkd transfer`: of images, or with --scenes of their pixels."""

from __future__ import annotations

from collections.abc import Sequence

from dfkd_jax.command import arguments


def main(argv: Sequence[str], prog: str) -> None:
    """Measures features, by `dfkd_jax.transfer` or `dfkd_jax.transfer_dense`."""
    if any(each.partition('=')[0] == '--scenes' for each in argv):
        summary = 'Measure what the maps of a network are worth for semantic segmentation.'
        arguments.parser(arguments.transfer_dense, prog, summary).split(argv)
        from dfkd_jax import transfer_dense

        return transfer_dense.main(argv, prog)
    arguments.make('transfer', prog).split(argv)
    from dfkd_jax.transfer import __main__ as transfer

    return transfer.main(argv, prog)
