"""``python -m entrgi`` is the ``entrgi`` command."""

from .cli import process

if __name__ == "__main__":
    raise SystemExit(process())
