"""``python -m titans``: what launchers of several processes start, as in ``torchrun -m titans train``."""

import sys

from titans.cli import main

sys.exit(main())
