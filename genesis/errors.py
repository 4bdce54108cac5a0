"""The one exception that a user is meant to see."""


class UserError(Exception):
    """A mistake that the user can mend.

    Its text is one sentence or two: what is wrong, where (file, key, case), and what to do. Every verb prints it
    without a traceback and exits with code 2.
    """


class TrainingAlarm(UserError):
    """A training that cannot go on; `kind` is its name among the alarms of `metrics.jsonl`."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
