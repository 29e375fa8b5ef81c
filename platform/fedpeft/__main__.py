"""`python -m fedpeft`: the same as the ``fedpeft`` command."""

from fedpeft.cli import main

if __name__ == "__main__":
    main()
