"""Every error that a user can correct.  The command line prints it as one line, no traceback."""

from __future__ import annotations


class UserError(Exception):
    """The base class.  Its message says what was found, what was expected and what to do."""


class ConfigError(UserError, ValueError):
    """A config that is wrong or does not fit."""


class NonFiniteError(UserError, RuntimeError):
    """A loss, metric or weight that is no longer finite."""


class CollapseError(UserError, RuntimeError):
    """A generator that makes one image, or images of a few classes alone."""


class DataError(UserError, ValueError):
    """Data that is missing, damaged or does not fit."""


class DiffusionError(UserError, ValueError):
    """A diffusion model's folder, prompt, scheduler or image size that does not fit."""


class LabelError(UserError, ValueError):
    """Class names or embeddings that are missing or do not fit."""


class PortError(UserError, ValueError):
    """Weights that cannot be read or do not fit the named architecture."""


class CheckpointError(UserError, ValueError):
    """A checkpoint or model folder that is missing, damaged or does not fit."""


class BankError(UserError, ValueError):
    """A bank that is damaged, incomplete or made by another config."""


class HostError(UserError, RuntimeError):
    """Another process ended the run, or several cannot run as one."""


class DeployError(UserError, ValueError):
    """A student that cannot be exported as asked, or a file that cannot be classified with."""
