"""Run the tutorial notebooks from a fresh kernel each and write their outputs down; any error stops it.

Paths of notebooks may be given; without them it runs all. `--check` runs them and leaves the files as they are.
"""

import argparse
import hashlib
import os
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

TUTORIALS = Path(__file__).resolve().parent.parent / "docs" / "tutorials"
# What differs from run to run or from machine to machine without saying anything.
KERNEL = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}


def digest(notebook: nbformat.NotebookNode) -> str:
    """Return what tells the notebook's code from any other, by which a test sees that the outputs are of this code."""
    sources = "\0".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    return hashlib.sha256(sources.encode()).hexdigest()[:16]


def run(path: Path) -> nbformat.NotebookNode:
    """Return the notebook with fresh outputs, and nothing about the machine that made them."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.metadata = {}
    client = NotebookClient(notebook, timeout=600, record_timing=False, coalesce_streams=True, kernel_name="python3")
    client.execute()
    language = {"name": "python", "pygments_lexer": "ipython3"}
    notebook.metadata = {**KERNEL, "language_info": language, "outputs_of": digest(notebook)}
    nbformat.validate(notebook)
    return notebook


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path, help="without any: all tutorials")
    parser.add_argument("--check", action="store_true", help="leave the files as they are")
    options = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", PYTHONHASHSEED="0")  # for the kernels and the workers they start
    for path in options.notebooks or sorted(TUTORIALS.glob("*.ipynb")):
        begun = time.perf_counter()
        notebook = run(path)
        if not options.check:
            nbformat.write(notebook, path)
        print(f"{path.name}: {time.perf_counter() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main()
