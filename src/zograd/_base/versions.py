"""What a bug report should begin with."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


__version__ = _version("zograd")


def show_versions() -> None:
    """Print the versions of zograd and of what it stands on, and the devices there are: for bug reports.

    Examples:
        >>> import zograd
        >>> zograd.show_versions()  # doctest: +ELLIPSIS
        zograd    ...
        python    ...
    """
    rows = {name: _version(name) for name in ("zograd",)}
    rows["python"] = f"{platform.python_version()} ({platform.platform()})"
    rows["torch"] = torch.__version__  # with its build, which the package's version may lack
    rows |= {name: _version(name) for name in ("optree", "tqdm", "numpy")}
    rows["threads"] = str(torch.get_num_threads())
    rows["devices"] = ", ".join(["cpu", *(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))])
    print("\n".join(f"{name:<9} {value}" for name, value in rows.items()))
