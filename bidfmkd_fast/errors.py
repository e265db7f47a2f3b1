"""The errors this package raises on purpose: each message says what was wanted, what came and what to do."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input from the caller: a wrong value, shape, range or file. The command line turns it into exit code 2."""


class InputTypeError(InputError, TypeError):
    """Bad input whose type or dtype is wrong."""


class BudgetExhausted(RuntimeError):
    """The next call would overrun the budget; it was not made, and nothing was spent on it."""


class BadAnswer(RuntimeError):
    """A black box answered no set of scores (NaN, a wrong shape); the call is counted, the answer dropped."""


class APIUnavailable(RuntimeError):
    """A service did not answer, whatever was tried; it may do so later. The attempts are counted."""


class PrecisionWarning(UserWarning):
    """An API's input or scores do not resolve a step, or no step at all: the gradient estimate may be noise."""


class ServiceWarning(UserWarning):
    """A service was skipped or served in a slower way than wanted, or an API does not look like what its spec says."""
