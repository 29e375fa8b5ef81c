"""Every fault a user can meet, with the exit code that the command line answers.

::

    FedpeftError                 1  anything below, when a caller wants them all
    ├── ConfigError              3  a TOML file is missing, malformed or contradicts itself
    ├── DataError                4  rows are missing, empty, unreadable or carry an unknown label
    ├── BaseError                5  the base cannot be loaded, quantized, or is another one than agreed
    ├── AdapterError             6  an adapter does not fit its base, its layout or its checksum
    ├── PolicyError              7  a plan is outside what the site's policy allows, or a caller's role or certificate what a server does
    ├── LinkError                8  the other side cannot be reached or believed, does not answer in time, or speaks another version
    ├── StorageError             9  no space, no permission, a torn file, or a folder that another process runs in
    ├── CohortError             10  too few sites answered to go on
    ├── UpdateError             11  an update is not finite, out of range or of another layout
    └── PrivacyError            12  masking, noise or the privacy budget cannot be kept as promised

A message names the thing, the value seen, what is allowed and the next step, in one line. Exit code 2 is the
command line's own (unknown option), 130 an interrupt by SIGINT, or by
SIGTERM of work that is not done (a service that SIGTERM ends answers 0:
`fedpeft.processes`), 70 a defect of fedpeft (with the traceback in the log).
"""

from __future__ import annotations

from typing import ClassVar


class FedpeftError(Exception):
    """A fault that its message explains to the user; never shown with a traceback."""

    exit_code: ClassVar[int] = 1


class ConfigError(FedpeftError):
    """A configuration file is missing, malformed or contradicts itself."""

    exit_code = 3


class DataError(FedpeftError):
    """Rows are missing, empty, unreadable or carry an unknown label."""

    exit_code = 4


class BaseError(FedpeftError):
    """A base cannot be loaded or quantized, or is another one than agreed."""

    exit_code = 5


class AdapterError(FedpeftError):
    """An adapter does not fit its base, its layout or its checksum."""

    exit_code = 6


class PolicyError(FedpeftError):
    """A plan asks for something that the site's policy does not allow, or a caller for what its role may not do."""

    exit_code = 7


class LinkError(FedpeftError):
    """The other side cannot be reached or believed, does not answer in time, or speaks another version."""

    exit_code = 8


class StorageError(FedpeftError):
    """No space, no permission, a torn file, or a folder that another process runs in."""

    exit_code = 9


class CohortError(FedpeftError):
    """Too few sites answered for the round to go on."""

    exit_code = 10


class UpdateError(FedpeftError):
    """An update is not finite, out of range or of another layout."""

    exit_code = 11


class PrivacyError(FedpeftError):
    """Masking, noise or the privacy budget cannot be kept as promised; nothing is released."""

    exit_code = 12


EXIT_CODES: dict[str, int] = {
    kind.__name__: kind.exit_code
    for kind in (
        ConfigError,
        DataError,
        BaseError,
        AdapterError,
        PolicyError,
        LinkError,
        StorageError,
        CohortError,
        UpdateError,
        PrivacyError,
    )
}


def kind_of(code: int) -> type[FedpeftError] | None:
    """The fault whose exit code is ``code``; None where no fault of ours has it."""
    return next((kind for kind in FedpeftError.__subclasses__() if EXIT_CODES.get(kind.__name__) == code), None)
