"""Makes the environment in which a kind of image's recipes run without one: `python tools/environment.py verify`."""

from __future__ import annotations

import argparse
import sys

from radeon_stack.catalog.kinds import load_kinds
from radeon_stack.cli.steps import step_view
from radeon_stack.errors import StackError
from radeon_stack.images.environments import environment_for
from radeon_stack.images.making import make
from radeon_stack.runs.store import home


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=sorted(load_kinds()))
    environment = environment_for(parser.parse_args().kind, home())
    try:
        if not environment.ready:
            with step_view(sys.stderr) as steps:
                make(environment, steps)
    except StackError as error:
        print(f"radeon-stack: {error}", file=sys.stderr)
        return error.exit_code
    print(environment.python)
    return 0


if __name__ == "__main__":
    sys.exit(main())
