"""The application on top of entrgi_kernels: command line, built-in tiny models, evaluation and reports."""

from entrgi_kernels import __version__

__all__ = ["__version__"]
