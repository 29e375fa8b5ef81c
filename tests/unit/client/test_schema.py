"""What a body may say: every field of the API is honoured, or refused by its name."""

from __future__ import annotations

import json

import pytest

from fedpeft_client.serve.errors import ApiError
from fedpeft_client.serve.schema import Chat, Completion, Embeddings, parse

USER = {"role": "user", "content": "hello"}
BODIES = {
    Chat: {"model": "base", "messages": [USER]},
    Completion: {"model": "base", "prompt": "hello"},
    Embeddings: {"model": "base", "input": "hello"},
}
NEUTRAL = [
    {"user": "u", "metadata": {"a": "b"}, "store": True},
    {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "modalities": ["text"]},
    {"service_tier": "auto", "reasoning_effort": "none", "verbosity": "medium", "safety_identifier": None},
    {"max_tokens": 3, "max_completion_tokens": 3},
    {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}},
    {"messages": [USER, {"role": "assistant", "content": "hi", "refusal": None, "tool_calls": [], "audio": None, "name": None}, USER]},
]
REFUSED = [
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"verbosity": "low"}, "verbosity"),
    ({"service_tier": "flex"}, "service_tier"),
    ({"safety_identifier": "x"}, "safety_identifier"),
    ({"prompt_cache_key": "x"}, "prompt_cache_key"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"top_k": 5}, "top_k"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"messages": [{**USER, "role": "assistant"}]}, "messages"),
    ({"messages": [{**USER, "name": "bob"}]}, "messages.0.name"),
    ({"messages": [{**USER, "content": [{"type": "input_audio", "input_audio": {}}]}]}, "messages.0.content.0.type"),
    ({"messages": [{**USER, "content": [{"type": "image_url", "text": "x"}]}]}, "messages.0.content.0"),
    ({"messages": [{**USER, "content": [{"type": "image_url", "image_url": {"url": "x", "id": 1}}]}]}, "messages.0.content.0.image_url.id"),
    ({"messages": [{**USER, "content": [{"type": "image_url", "image_url": {"url": "x"}}] * 2}]}, "messages"),
    ({"messages": [USER, {"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages.1.role"),
    ({"messages": [USER, {"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]}, "messages.1.tool_calls"),
    ({"temperature": float("nan")}, "temperature"),
]


@pytest.mark.parametrize("change", NEUTRAL, ids=lambda change: next(iter(change)))
def test_what_changes_nothing_is_taken(change):
    assert parse(json.dumps(BODIES[Chat] | change).encode(), Chat).asked == "hello"


@pytest.mark.parametrize(("change", "param"), REFUSED, ids=lambda one: one if isinstance(one, str) else "")
def test_what_cannot_be_had_is_refused_by_name(change, param):
    with pytest.raises(ApiError) as refused:
        parse(json.dumps(BODIES[Chat] | change).encode(), Chat)
    assert (refused.value.status, refused.value.param) == (400, param)
    assert param.rpartition(".")[2] in str(refused.value)


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_the_official_client_sends_nothing_that_goes_unnoticed(body):
    """Every parameter that the ``openai`` package knows with a value that nobody can mean, is refused by its name."""
    types = pytest.importorskip("openai.types", reason="the openai package, of the extra dev, says what its client sends")
    named = {
        Chat: "chat.completion_create_params.CompletionCreateParamsBase",
        Completion: "completion_create_params.CompletionCreateParamsBase",
    }
    table: object = types
    for part in named.get(body, "embedding_create_params.EmbeddingCreateParams").split("."):
        table = getattr(table, part)
    sent = set(table.__annotations__) - {"user", "metadata", "store"}  # type: ignore[attr-defined]
    assert len(sent) > 3
    for name in sent:
        with pytest.raises(ApiError) as refused:
            parse(json.dumps(BODIES[body] | {name: {"nobody": "means this"}}).encode(), body)
        assert (refused.value.param or "").startswith(name), name
