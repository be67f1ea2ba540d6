"""`python -m spectralquant`."""

import sys

from spectralquant.cli.main import main

sys.exit(main())
