"""The one exception that means "the user can mend this": shown as a message without a traceback, exit code 2."""


class InputError(ValueError):
    """Arguments or data that cannot be used.

    The message says where (flag, or file and line), which field, what was found, and what to do about it.
    """
