"""Counts, sizes and times as a person reads them."""

UNKNOWN = "unknown"


def counted(number: int, one: str, several: str | None = None) -> str:
    """A count in words: "1 seed", "1,024 seeds"; `several` where an s is not enough."""
    return f"{number:,} {one if number == 1 else several or one + 's'}"


def quantity(value: float | int | None) -> str:
    """A number in three digits with a unit, such as 1.25 G; None is unknown."""
    if value is None:
        return UNKNOWN
    for place, unit in enumerate("ZEPTGMk"):
        if value >= (size := 1000.0 ** (7 - place)):
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def duration(seconds: float | int) -> str:
    """Seconds as a person says them, two units at most: 42 s, 3 min, 2 h 5 min, 3 d 4 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes = round(whole / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if hours else f"{days} d"
