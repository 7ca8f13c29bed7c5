"""Reports as text."""


def table(title: str, rows: list[tuple[str, str]]) -> str:
    """Two columns under a title."""
    width = max(len(name) for name, _ in rows)
    return "\n".join([title, "-" * len(title), *(f"{name:<{width}}  {text}".rstrip() for name, text in rows)])
