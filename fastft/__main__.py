"""`python -m fastft` is the `fastft` command."""

import sys

from fastft.cli import main

sys.exit(main())
