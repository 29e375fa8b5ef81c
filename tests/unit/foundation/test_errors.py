import fedpeft.errors as errors
from fedpeft.errors import EXIT_CODES, FedpeftError, kind_of


def kinds():
    return [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, FedpeftError)]


def test_every_error_has_its_own_exit_code_in_the_table():
    assert {kind.__name__: kind.exit_code for kind in kinds() if kind is not FedpeftError} == EXIT_CODES
    assert len(set(EXIT_CODES.values())) == len(EXIT_CODES)
    assert not set(EXIT_CODES.values()) & {0, 1, 2, 70, 130}


def test_the_docstring_draws_the_tree_with_the_codes():
    for kind in kinds():
        line = next(line for line in errors.__doc__.splitlines() if kind.__name__ in line)
        assert f" {kind.exit_code} " in line


def test_a_code_names_its_error_and_no_other():
    class Own(FedpeftError):
        """A room's own fault, without a code of its own."""

    assert {code: kind.__name__ for code in range(256) if (kind := kind_of(code))} == {code: name for name, code in EXIT_CODES.items()}
    assert Own.exit_code == 1
