"""Define all tolerances of the tests: (relative, absolute), each with its reason."""

TOLERANCES: dict[str, tuple[float, float]] = {
    # The same numbers in another order of operations, float32 against float64, values near 1.
    "float32": (1e-4, 1e-5),
    # One rounding of the result.
    "rounding": (2e-7, 2e-7),
    # A kernel's float32 sums of up to 1000 terms against float64.
    "kernel": (1e-5, 2e-6),
    # float64 against float64 in another order of operations.
    "float64": (1e-10, 1e-12),
    # Scores or gradients that come from bfloat16 or float16 inputs rounded before.
    "half": (1e-2, 1e-2),
}
