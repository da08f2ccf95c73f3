"""`python -m longdream`: the command line."""

import sys

from longdream.agent.cli.main import main

sys.exit(main())
