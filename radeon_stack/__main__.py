"""`python -m radeon_stack` is the same program as the console script."""

from radeon_stack.cli import main

if __name__ == "__main__":
    main()
