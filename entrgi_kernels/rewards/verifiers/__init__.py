"""Verifiers: functions of (prompt, text) that say whether, or how well, a finished text does what was asked.

:func:`entrgi_kernels.rewards.verifier` makes rewards of them, and of any function like them.
"""

from .answers import Arithmetic, Countdown, Sudoku
from .naming import named
from .python import PythonTests
from .texts import Json, Length, Regex

__all__ = ["Arithmetic", "Countdown", "Json", "Length", "PythonTests", "Regex", "Sudoku", "named"]
