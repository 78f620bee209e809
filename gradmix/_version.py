"""The version, in its only place: read by the package, by its metadata and by the extension's build."""

__version__ = "0.2.0"
