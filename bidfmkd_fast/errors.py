"""Define the errors that this package raises on purpose.

Each message says what was wanted, what came instead, and what to do.
"""

from __future__ import annotations

from bidfmkd_fast.secrets import scrub


class _WithoutSecrets(Exception):
    """Base of all: it replaces secrets in the message.

    A message may repeat an argument or the answer of a service, and both may hold a secret.
    """

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(scrub(part) if isinstance(part, str) else part for part in arguments))


class InputError(_WithoutSecrets, ValueError):
    """The caller's input is bad: a wrong value, shape, range or file.

    The command line turns this error into exit code 2.
    """


class InputTypeError(InputError, TypeError):
    """The caller's input has the wrong type or dtype."""


class BudgetExhausted(_WithoutSecrets, RuntimeError):
    """The next call would exceed the budget; it was not made and cost nothing."""


class BadAnswer(_WithoutSecrets, RuntimeError):
    """A black box answered something that is not scores, such as NaN or a wrong shape.

    The call counts in the ledger, and the answer is dropped.
    """


class APIUnavailable(_WithoutSecrets, RuntimeError):
    """A service did not answer after all retries, but may answer later.

    The attempts count in the ledger.
    """


class RankLost(_WithoutSecrets, RuntimeError):
    """Another process of a job of several (see `runtime.ranks`) has failed, died or not begun.

    What the job has kept stays, and the same command goes on from it.

    Attributes:
        told: whether the other process shows by itself why it has ended.
    """

    told = False


class PrecisionWarning(_WithoutSecrets, UserWarning):
    """A step is too small for the precision of an API's input or scores.

    The gradient estimate may then be noise.
    """


class ServiceWarning(_WithoutSecrets, UserWarning):
    """A service was skipped or is asked in a slower way, or an API contradicts its spec."""
