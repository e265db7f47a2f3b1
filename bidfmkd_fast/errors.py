"""The errors this package raises on purpose: each message says what was wanted, what came and what to do."""

from __future__ import annotations

from bidfmkd_fast.secrets import scrub


class _WithoutSecrets(Exception):
    """Base of all: whatever a message repeats of a service's words or of an argument, no secret is
    in it.
    """

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(scrub(one) if isinstance(one, str) else one for one in arguments))


class InputError(_WithoutSecrets, ValueError):
    """Bad input from the caller: a wrong value, shape, range or file. The command line turns it
    into exit code 2.
    """


class InputTypeError(InputError, TypeError):
    """Bad input whose type or dtype is wrong."""


class BudgetExhausted(_WithoutSecrets, RuntimeError):
    """The next call would overrun the budget; it was not made, and nothing was spent on it."""


class BadAnswer(_WithoutSecrets, RuntimeError):
    """A black box answered no set of scores (NaN, a wrong shape); the call is counted, the answer
    dropped.
    """


class APIUnavailable(_WithoutSecrets, RuntimeError):
    """A service did not answer, whatever was tried; it may do so later. The attempts are
    counted.
    """


class PrecisionWarning(_WithoutSecrets, UserWarning):
    """An API's input or scores do not resolve a step, or no step at all: the gradient estimate may
    be noise.
    """


class ServiceWarning(_WithoutSecrets, UserWarning):
    """A service was skipped or served in a slower way than wanted, or an API does not look like
    what its spec says.
    """
