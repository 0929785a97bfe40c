"""Where the command `vl01` begins, and `python -m jobs`: Ctrl-C is heard before all is imported."""

import sys
from typing import NoReturn


def main() -> NoReturn:
    try:
        from jobs import cli
    except KeyboardInterrupt:
        sys.exit(130)  # as the shell says it, and as later where there is nothing to go on with
    cli.main()


if __name__ == "__main__":
    main()
