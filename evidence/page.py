"""Numbers and tables in the format of the pages."""


def number(x: float, digits: int = 2) -> str:
    """Returns the number with two significant digits. Values below 1e-12 are rounding errors and become 0."""
    if x != x:
        return "NaN"
    if abs(x) < 1e-12:
        return "0"
    if 1e-3 <= abs(x) < 1e4:
        return f"{x:.{digits}g}" if abs(x) < 10 else f"{x:.0f}"
    return f"{x:.0e}".replace("e-0", "e-").replace("e+0", "e")


def table(header: list[str], rows: list[list[str]]) -> str:
    """Returns a Markdown table. The first column is text."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])
