"""One line in existing code: guide(), and the third-party loops that it guides, one file each; accelerate().

docs/integrations.md is their table, ``registry`` the list that guide() asks.
"""

from .accelerate import Acceleration, accelerate
from .base import Guidance
from .dream import DreamHooks
from .guide import guide

__all__ = ["Acceleration", "DreamHooks", "Guidance", "accelerate", "guide"]
