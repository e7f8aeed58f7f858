# SPDX-License-Identifier: Apache-2.0
"""`python -m nemotron_fast` is the `nemotron-fast` command."""

import sys

from nemotron_fast.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
