"""Checks of configuration values; each names the field."""

from __future__ import annotations

import math


class ConfigError(ValueError):
    """A configuration value that cannot be used; the message names the field."""


def must(condition: bool, name: str, expected: str, got: object, advice: str) -> None:
    """Raise ConfigError unless the condition holds."""
    if not condition:
        raise ConfigError(f"config: `{name}` must be {expected}, got {got!r}; {advice}")


def positive_int(name: str, value: object, *, minimum: int = 1) -> None:
    """Refuse anything but an integer of at least `minimum`."""
    ok = isinstance(value, int) and not isinstance(value, bool) and value >= minimum
    must(ok, name, f"an integer >= {minimum}", value, "give a whole number")


def positive(name: str, value: object, *, zero: bool = False) -> None:
    """Refuse anything but a finite number above 0, or at 0 where that is allowed."""
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    ok = ok and (value > 0 or (zero and value == 0))  # type: ignore[operator]
    must(ok, name, "a finite number " + (">= 0" if zero else "> 0"), value, "give a number")


def choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Refuse anything but one of the allowed values."""
    must(value in allowed, name, "one of " + ", ".join(allowed), value, "choose one of them")
