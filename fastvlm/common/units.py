"""Bytes and seconds: how every room shows them, and the units of sizes that are typed."""

SIZE_UNITS = {"kB": 10**3, "MB": 10**6, "GB": 10**9, "MiB": 1 << 20, "GiB": 1 << 30}


def counted(number: int, word: str) -> str:
    """`2 files`, `1 process`, `3 processes`."""
    return f"{number} {word}" + ("" if number == 1 else "es" if word.endswith("s") else "s")


def format_bytes(size: float) -> str:
    """Gigabytes with two decimals, or three digits of a smaller unit."""
    if size >= 999.5e6:
        return f"{size / 1e9:.2f} GB"
    if size >= 999.5e3:
        return f"{size / 1e6:.3g} MB"
    return f"{size / 1e3:.3g} kB" if size >= 999.5 else f"{size:.0f} B"


def format_seconds(seconds: float) -> str:
    """Three digits of seconds, or of milliseconds below one second."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def format_duration(seconds: float) -> str:
    """Whole seconds, or minutes from two on: how long a step takes."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
