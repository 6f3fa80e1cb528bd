"""`python -m effad_lib.execution ORDER` is the process of one run."""

import json
import sys

from effad_lib.execution.process import main

sys.exit(main(json.loads(sys.argv[1])))
