"""Errors that a person can act on. Each carries the exit code of the command line; the message is one clear line."""


class GptOssError(Exception):
    """Base of all errors that the command line prints without a traceback.

    `everywhere`: in a run of many processes all have it at the same place, so that the first alone reports it.
    """

    exit_code = 1
    everywhere = False


class RunError(GptOssError):
    """A run that could not finish (disk full, verification failed)."""

    exit_code = 1


class UsageError(GptOssError):
    """Bad usage or configuration: unknown key, impossible combination, missing file given by the user."""

    exit_code = 2


class NumericsError(GptOssError):
    """Training stopped because the loss or the gradients were not finite."""

    exit_code = 3
    everywhere = True


class CorruptError(GptOssError):
    """Data or a checkpoint that is damaged, incomplete or not of the stated form."""

    exit_code = 4
