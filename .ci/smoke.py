"""Install each distribution of a folder into an empty environment and use it: ``python .ci/smoke.py dist``."""

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

CONSTRAINTS = Path(__file__).resolve().parent.parent / "constraints.txt"
# torch itself warns where there is no numpy, which an empty environment has not.
WARNINGS = ("-W", "error", "-W", "ignore:Failed to initialize NumPy:UserWarning")
PROGRAM = """
import sys
from importlib.metadata import version
from importlib.resources import files

import torch
import zograd
import zograd.compat.torchopt

assert sys.prefix in zograd.__file__, zograd.__file__
assert zograd.__version__ == version("zograd") == sys.argv[1], (zograd.__version__, sys.argv[1])
assert (files("zograd") / "py.typed").is_file()


@zograd.zero_order(method="antithetic", num_samples=64, sigma=0.3, seed=0)
def loss(x):
    return float((x.round() - 2).square().sum())


x = torch.zeros(3, requires_grad=True)
loss(x).backward()
assert (x.grad < 0).all(), x.grad
assert zograd.check(loss, x, budget=200)
zograd.show_versions()
"""


def version_of(path: Path) -> str:
    """The version in the name of a wheel or of a source distribution."""
    return path.name.removesuffix(".tar.gz").split("-")[1]


def smoke(path: Path) -> None:
    """Install one file with what it asks for, and run the program far from the checkout."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder, "Scripts" if sys.platform == "win32" else "bin", "python")
        pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", CONSTRAINTS]
        subprocess.run([*pip, path.resolve()], check=True, cwd=folder)
        subprocess.run([python, *WARNINGS, "-c", PROGRAM, version_of(path)], check=True, cwd=folder)
    print(f"{path.name}: installs and works")


def main() -> None:
    """Try every file; there must be a wheel and a source distribution."""
    found = sorted(Path(sys.argv[1]).glob("zograd-*"))
    if {path.suffix for path in found} != {".whl", ".gz"}:
        sys.exit(f"{sys.argv[1]} must have a wheel and a source distribution, has {[path.name for path in found]}.")
    for path in found:
        smoke(path)


if __name__ == "__main__":
    main()
