"""Where the repository and the support files of the tests are, and on which device models are."""

import os
from pathlib import Path

SUPPORT = Path(__file__).resolve().parent
ROOT = SUPPORT.parents[1]
DEVICE = os.environ.get("GVPO_DEVICE", "cpu")  # of tiny models; the session gpu sets it
