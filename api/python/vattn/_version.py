"""The version of this package, which is that of the library: pyproject.toml reads it here."""

__version__ = "0.1.0"
