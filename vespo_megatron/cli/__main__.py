"""`python -m vespo_megatron.cli`: the same as `vespo-megatron`."""

import sys

from vespo_megatron.cli.command_line import main

if __name__ == "__main__":
    sys.exit(main())
