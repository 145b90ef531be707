"""`python tests/fuzz`, or `make fuzz`."""

import os
import sys
from pathlib import Path

# Before torch is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
here = Path(__file__).resolve().parent
# The checkout's package is tested, unless PYTHONPATH has another (.ci/sanitize).
given = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
sys.path[: 1 + len(given)] = [str(here.parent), *given, str(here.parents[1]), str(here.parents[1] / "python")]

from fuzz.driver import main  # noqa: E402

sys.exit(main())
