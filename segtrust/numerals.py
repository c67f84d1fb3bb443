"""Numbers as a reader sees them."""


def plain(value):
    """Return a value of a table as a float, or None for null."""
    return None if value is None or value != value else float(value)


def number(value, decimals=3):
    """Return a number as text with a true minus sign; a dash for None.

    Decimals are added (up to 6) as long as rounding would turn the value into 0 or 1 that it is not.
    """
    if value is None:
        return "–"
    while decimals < 6 and round(value, decimals) in (-1, 0, 1) and value not in (-1, 0, 1):
        decimals += 1
    if round(value, decimals) == 0 != value:
        return f"{value:.1e}".replace("-", "−")
    return f"{round(value, decimals) + 0.0:.{decimals}f}".replace("-", "−")


def interval_text(low, high, decimals=3):
    """Return `[low–high]`, with `to` between negative bounds; empty where there is no interval."""
    if low is None or high is None:
        return ""
    between = " to " if low < 0 else "–"
    return f"[{number(low, decimals)}{between}{number(high, decimals)}]"
