"""The one exception that means "the user can mend this"."""


class InputError(ValueError):
    """Bad input: model, data, settings, machine or files. Its text is one line: what, where, what to do.

    Stages end with that line and exit code 2; any other exception is a defect of ours and keeps its
    traceback.
    """


def reason(error: BaseException) -> str:
    """A library's exception as part of a line: its first line of text, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
