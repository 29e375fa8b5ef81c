"""Streamed text is the text of the whole, and never shows a stop string or half a character."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.serving.text import TextStream


class Bytes:
    """A tokenizer of single bytes."""

    def decode(self, ids, skip_special_tokens=True):
        return bytes(ids).decode("utf-8", "replace")


@pytest.fixture(scope="module", params=["stories260k", "tinystories-656k"])
def tokenizer(request, shared_models):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(shared_models / request.param)


@given(text=st.text(max_size=20), stops=st.lists(st.text(min_size=1, max_size=3), max_size=3))
def test_pieces_are_the_whole_text_up_to_the_first_stop_string(text, stops):
    stream, pieces = TextStream(Bytes(), stops), []
    for byte in text.encode():
        pieces.append(stream.push(byte))
        if stream.stopped:
            break
    pieces.append(stream.close())
    ends = [text.find(word) for word in stops if word in text]
    seen = "".join(pieces)
    assert all(word not in seen for word in stops)
    assert stream.stopped == bool(ends)
    assert seen == text if not ends else text.startswith(seen) and len(seen) <= min(ends) + 3
    assert "\ufffd" not in seen or "\ufffd" in text


def test_a_stop_string_across_tokens_is_never_shown():
    stream = TextStream(Bytes(), ["</end>"])
    assert [stream.push(byte) for byte in b"ok</en"] == ["o", "k", "", "", "", ""]
    assert stream.push(ord("x")) == "</enx"
    assert "".join(stream.push(byte) for byte in b"</end>") == ""
    assert stream.stopped
    assert stream.close() == ""


def test_half_a_character_waits_for_its_other_half():
    stream = TextStream(Bytes())
    assert [stream.push(byte) for byte in "é".encode()] == ["", "é"]
    assert stream.push(0xC3) == ""
    assert stream.close() == "\ufffd"


@settings(max_examples=40)
@given(text=st.text(max_size=12), data=st.data())
def test_pieces_of_real_tokens_are_the_decoded_whole(tokenizer, text, data):
    """Any text, bytes and all, then any tokens that are not lone bytes."""
    known = [token for token in range(len(tokenizer)) if not tokenizer.convert_ids_to_tokens(token).startswith("<0x")]
    ids = tokenizer(text)["input_ids"] + data.draw(st.lists(st.sampled_from(known), max_size=16))
    stream = TextStream(tokenizer)
    seen = "".join([*(stream.push(token) for token in ids), stream.close()])
    assert seen == tokenizer.decode(ids, skip_special_tokens=True)
