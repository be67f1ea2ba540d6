"""What has to be installed, looked up when this package is imported and without importing it."""

from importlib.metadata import PackageNotFoundError, version

from spectralquant.errors import DependencyError

TRANSFORMERS = (4, 56)


def require_transformers() -> None:
    """Raise if transformers is older than `TRANSFORMERS`. Where it is missing, `import transformers` will say so."""
    try:
        found = version("transformers")
    except PackageNotFoundError:
        return
    if tuple(int(number) for number in found.split(".")[:2]) < TRANSFORMERS:
        needed = "{}.{}".format(*TRANSFORMERS)
        raise DependencyError(f'transformers {found} is installed, spectralquant needs {needed} or later: pip install --upgrade "transformers>={needed}"')
