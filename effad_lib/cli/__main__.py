"""`python -m effad_lib.cli`, as torchrun needs it."""

import sys

from effad_lib.cli import main

sys.exit(main())
