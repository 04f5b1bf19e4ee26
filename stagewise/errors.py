"""Errors that are shown as a message without a traceback."""


class InputError(ValueError):
    """Arguments or data that cannot be used.

    The message says where (flag, or file and line), which field, what was found, and what to do about it.
    """


class TrainingDiverged(RuntimeError):
    """Training has gone where nothing good comes of it: exit code 1, with the way back in the message.

    good_until: the last step whose checkpoint is sound.
    """

    def __init__(self, message: str, good_until: int):
        super().__init__(message)
        self.good_until = good_until


class SaveFailed(RuntimeError):
    """A checkpoint could not be written: exit code 1, with the way on in the message."""


class ProcessLost(RuntimeError):
    """Another process of the group has ended: exit code 1; what was wrong is in its own output."""


def first_line(error: BaseException) -> str:
    """What a library says, without its advice for programmers; all of it where its first line only leads in."""
    line, _, rest = str(error).strip().partition("\n")
    return " ".join(f"{line} {rest}".split()) if line.rstrip().endswith(":") else line.rstrip(". ")
