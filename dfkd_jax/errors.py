"""What can go wrong: every error that a user can mend, told in one line without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """The base of all others: its message says what was found, what was expected and what to do."""


class ConfigError(UserError, ValueError):
    """A config that does not fit: what was wrong, what was expected, what to do."""


class NonFiniteError(UserError, RuntimeError):
    """A loss that stopped being finite."""


class DataError(UserError, ValueError):
    """Data that is missing, broken or does not fit; the message says what to do."""


class DiffusionError(UserError, ValueError):
    """A model folder, prompt, scheduler or image size that does not fit; it says what to do."""


class LabelError(UserError, ValueError):
    """Class names or embeddings that are missing or do not fit; the message says what to do."""


class PortError(UserError, ValueError):
    """Weights that cannot be read, or that are not those of the named architecture."""


class CheckpointError(UserError, ValueError):
    """A checkpoint or a model folder that is missing, damaged or made for something else."""


class BankError(UserError, ValueError):
    """A bank that is damaged, incomplete or made for something else."""


class HostError(UserError, RuntimeError):
    """What ended a run on another process, or keeps several from running as one."""
