"""`python -m efft` is `efft`."""

import sys

from efft.main import main

sys.exit(main())
