"""The one error type that a user is meant to read."""


class PunaError(Exception):
    """A mistake that the user can mend: the message says what is wrong, where, and what to do next.

    Doors (command line, HTTP) print the message alone, without a traceback.
    """


class AgreedError(PunaError):
    """A PunaError of one process that every process of a run raises, so that it need be told once."""
