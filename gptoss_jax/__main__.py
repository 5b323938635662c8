"""`python -m gptoss_jax` is the command line."""

import sys

from gptoss_jax.cli import main

sys.exit(main())
