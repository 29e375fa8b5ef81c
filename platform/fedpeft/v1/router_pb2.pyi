from fedpeft.v1 import registry_pb2 as _registry_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RouteRequest(_message.Message):
    __slots__ = ("text", "embedding", "task", "router")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    ROUTER_FIELD_NUMBER: _ClassVar[int]
    text: str
    embedding: Embedding
    task: str
    router: str
    def __init__(self, text: _Optional[str] = ..., embedding: _Optional[_Union[Embedding, _Mapping]] = ..., task: _Optional[str] = ..., router: _Optional[str] = ...) -> None: ...

class Embedding(_message.Message):
    __slots__ = ("values", "encoder")
    VALUES_FIELD_NUMBER: _ClassVar[int]
    ENCODER_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[float]
    encoder: str
    def __init__(self, values: _Optional[_Iterable[float]] = ..., encoder: _Optional[str] = ...) -> None: ...

class RouteResponse(_message.Message):
    __slots__ = ("mixture", "abstained", "reason", "score", "scores", "base", "router", "level")
    class ScoresEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    MIXTURE_FIELD_NUMBER: _ClassVar[int]
    ABSTAINED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    ROUTER_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    mixture: _containers.RepeatedCompositeFieldContainer[Part]
    abstained: bool
    reason: str
    score: float
    scores: _containers.ScalarMap[str, float]
    base: str
    router: str
    level: str
    def __init__(self, mixture: _Optional[_Iterable[_Union[Part, _Mapping]]] = ..., abstained: _Optional[bool] = ..., reason: _Optional[str] = ..., score: _Optional[float] = ..., scores: _Optional[_Mapping[str, float]] = ..., base: _Optional[str] = ..., router: _Optional[str] = ..., level: _Optional[str] = ...) -> None: ...

class Part(_message.Message):
    __slots__ = ("task", "digest", "weight")
    TASK_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    task: str
    digest: str
    weight: float
    def __init__(self, task: _Optional[str] = ..., digest: _Optional[str] = ..., weight: _Optional[float] = ...) -> None: ...

class CardsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CardPart(_message.Message):
    __slots__ = ("version", "chunk")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    version: _registry_pb2.Version
    chunk: _registry_pb2.Chunk
    def __init__(self, version: _Optional[_Union[_registry_pb2.Version, _Mapping]] = ..., chunk: _Optional[_Union[_registry_pb2.Chunk, _Mapping]] = ...) -> None: ...
