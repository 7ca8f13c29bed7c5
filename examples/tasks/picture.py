"""Pictures small enough for a repository."""

from PIL import Image


def save(figure, path, dpi=80):
    """Save a figure of matplotlib with a palette of 64 colors, which takes about a quarter of the room."""
    figure.savefig(path, dpi=dpi, format="png")
    with Image.open(path) as image:
        small = image.convert("RGB").quantize(64)
    small.save(path, format="png", optimize=True)
