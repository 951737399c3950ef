"""The command `dfkd`, whose subcommands are the programs of the package.

`arguments` holds what each takes and imports nothing heavy, so help, completion and a mistake in a
flag are quick; `main` dispatches.  `distill`, `evaluate`, `report` and `doctor` are only here.
"""
