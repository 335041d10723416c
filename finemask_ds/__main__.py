"""`python -m finemask_ds` is the `finemask` command."""

import sys

from finemask_ds.cli import main

if __name__ == "__main__":
    sys.exit(main())
