"""`python -m minilora` is `minilora`."""

import sys

from .cli import main

sys.exit(main())
