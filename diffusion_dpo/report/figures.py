"""Numbers as a reader of curves wants them: significant digits, relative errors, a value with its standard error."""

from diffusion_dpo.report.training_log import Point
from diffusion_dpo.report.words import MINUS, NBSP, number

DASH = number(None, 0)
"""What stands for a number that is missing."""


def significant(value: float) -> str:
    """Return three significant digits: `12.3`, `0.00123`, `1.2e-5` (with a real minus sign), `2,340`."""
    if value and not 1e-4 <= abs(value) < 1e6:
        digits, _, exponent = f"{value:.1e}".partition("e")
        return f"{digits.removesuffix('.0')}e{int(exponent)}".replace("-", MINUS)
    return (f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}").replace("-", MINUS)


def relative(value: float, *, signed: bool = True) -> str:
    """Return `+35 %` or `-1.2 %`, with a real minus sign."""
    places = 2 if abs(value) < 0.01 else 1 if abs(value) < 0.1 else 0
    return f"{number(100 * value, places, signed=signed)}{NBSP}%"


def relative_with_error(point: Point) -> str:
    """Return `+67.0 % ± 0.8 %`: as many decimals as its standard error deserves."""
    error = point.standard_error
    if not error:
        return relative(point.value)
    places = 2 if error < 0.002 else 1 if error < 0.02 else 0
    return f"{number(100 * point.value, places, signed=True)}{NBSP}% ± {number(100 * error, places)}{NBSP}%"


def with_error(point: Point, places: int = 2) -> str:
    """Return `0.63 ± 0.03`."""
    return f"{point.value:.{places}f}" + (f" ± {point.standard_error:.{places}f}" if point.standard_error else "")
