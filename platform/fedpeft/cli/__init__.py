"""The ``fedpeft`` command: verbs of the platform, and those of client and coordinator by entry point.

Nothing heavy is imported here: `fedpeft --help` answers at once, and each verb imports what it needs.
"""

from fedpeft.cli.main import main

__all__ = ["main"]
