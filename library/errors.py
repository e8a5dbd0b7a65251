"""The error that is the user's to mend."""


class UserError(ValueError):
    """Bad input. The message is one sentence: what was given, what is allowed, what to do. Scripts print it and exit with 2."""
