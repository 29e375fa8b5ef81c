"""The demo's follower reads each whole line once, however the file grows."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fedpeft.parity.children import added
from fedpeft.processes import last_words


@given(rows=st.lists(st.text("ab", max_size=5), max_size=6), cuts=st.lists(st.integers(0, 40), max_size=5))
def test_lines_come_once_and_whole(tmp_path_factory, rows, cuts):
    path = tmp_path_factory.mktemp("follow") / "events"
    content = "".join(f"{row}\n" for row in rows).encode()
    seen, offset = b"", 0
    for cut in [*sorted(cuts), len(content)]:
        path.write_bytes(content[:cut])
        fresh = added(path, offset)
        assert fresh == b"" or fresh.endswith(b"\n")
        seen, offset = seen + fresh, offset + len(fresh)
    assert seen == content


def test_nothing_of_a_file_that_is_not_there(tmp_path):
    assert added(tmp_path / "absent", 0) == b""
    assert last_words(tmp_path / "absent") == "it says nothing"


def test_the_last_words_are_the_last_line_that_is_not_blank(tmp_path):
    (tmp_path / "log").write_text("first\nlast\n\n  \n")
    assert last_words(tmp_path / "log") == "last"
