"""Print constraints.txt for the environment whose Python runs this script (needs `packaging`)."""

from importlib.metadata import distributions

from packaging.specifiers import SpecifierSet

HEADER = """\
# The versions CI uses, made on Linux with Python 3.11. To regenerate, take new versions and write them down:
#   .venv/bin/python -m pip install --upgrade --upgrade-strategy eager torch==2.13.0 \\
#       -e '.[tests,lint,examples,docs,build]'
#   .venv/bin/python .ci/constraints.py > constraints.new && mv constraints.new constraints.txt
# A release that has dropped Python 3.10 carries a marker: there, pip picks an older one."""

# Each release of torch bounds setuptools in its own way, so that a pin would stand against `make TORCH=...`.
NOT_PINNED = {"pip", "setuptools", "zograd"}


def pin(name: str, version: str, requires_python: str) -> str:
    """Return one line; a local label such as `+cpu` is dropped, since it names a build and not a release."""
    marker = "" if SpecifierSet(requires_python).contains("3.10.99") else ' ; python_version >= "3.11"'
    return f"{name}=={version.partition('+')[0]}{marker}"


def main() -> None:
    """Print the header and one sorted line for each installed distribution."""
    installed = {found.metadata["Name"].lower().replace("_", "-"): found for found in distributions()}
    print(HEADER)
    for name in sorted(installed.keys() - NOT_PINNED):
        found = installed[name]
        print(pin(name, found.version, found.metadata["Requires-Python"] or ""))


if __name__ == "__main__":
    main()
