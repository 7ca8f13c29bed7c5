"""Text for a small language model: the docstrings of the standard library that Python comes with."""

import ast
import sysconfig
from pathlib import Path

import torch

BEFORE = (
    "asyncio",
    "difflib",
    "email",
    "http",
    "importlib",
    "inspect",
    "logging",
    "typing",
    "unittest",
    "urllib",
    "xml",
)
AFTER = ("_pydecimal", "fractions", "ipaddress", "statistics")
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))  # all others are left out


def docstrings(package):
    """Those of a package and all its modules, in the order of its files."""
    place = Path(sysconfig.get_paths()["stdlib"]) / package
    files = sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node)
                if text and len(text) > 40:
                    yield text


def corpus(packages):
    """All their docstrings, one after the other, as indices into ``CHARACTERS``; every fifth one is held out."""
    index = {character: i for i, character in enumerate(CHARACTERS)}
    parts = [], []
    for i, text in enumerate(text for package in packages for text in docstrings(package)):
        parts[i % 5 == 4].extend(index[c] for c in text + "\n\n" if c in index)
    return tuple(torch.tensor(part) for part in parts)


def windows(text, number, length, generator):
    """Random pieces of a text: inputs and the characters that follow, both (number, length)."""
    starts = torch.randint(len(text) - length, (number, 1), generator=generator)
    pieces = text[starts + torch.arange(length + 1)]
    return pieces[:, :-1], pieces[:, 1:]


def in_a_row(text, length):
    """The text cut into pieces: inputs and the characters that follow."""
    number = (len(text) - 1) // length
    return text[: number * length].view(number, length), text[1 : number * length + 1].view(number, length)
