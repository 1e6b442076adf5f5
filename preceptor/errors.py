"""The one error that a user can mend."""

from __future__ import annotations


class UserError(ValueError):
    """A mismatch found at the door.

    Its text is one clear sentence that names what does not fit and says what to do. The command line prints that
    sentence and exits with status 2, without a traceback.
    """
