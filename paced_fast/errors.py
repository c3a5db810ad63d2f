"""The two kinds of failure a user meets: wrong input, and a run that cannot go on."""


class InputError(ValueError):
    """Something the user gave is wrong. The message is one line that names the thing and the remedy; exit status 2."""


class TrainingError(RuntimeError):
    """The run stopped itself (non-finite steps in a row, for example). One line that says why; exit status 3."""
