from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusResponse(_message.Message):
    __slots__ = ("federation", "running", "round", "rounds", "step", "base", "masked", "tasks", "sites")
    class TasksEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: TaskStatus
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[TaskStatus, _Mapping]] = ...) -> None: ...
    class SitesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: SiteStatus
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[SiteStatus, _Mapping]] = ...) -> None: ...
    FEDERATION_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    MASKED_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    SITES_FIELD_NUMBER: _ClassVar[int]
    federation: str
    running: bool
    round: int
    rounds: int
    step: str
    base: str
    masked: bool
    tasks: _containers.MessageMap[str, TaskStatus]
    sites: _containers.MessageMap[str, SiteStatus]
    def __init__(self, federation: _Optional[str] = ..., running: _Optional[bool] = ..., round: _Optional[int] = ..., rounds: _Optional[int] = ..., step: _Optional[str] = ..., base: _Optional[str] = ..., masked: _Optional[bool] = ..., tasks: _Optional[_Mapping[str, TaskStatus]] = ..., sites: _Optional[_Mapping[str, SiteStatus]] = ...) -> None: ...

class TaskStatus(_message.Message):
    __slots__ = ("adapter", "updated", "skipped", "loss", "scores", "version", "last_reason", "drift", "privacy")
    class ScoresEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class DriftEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    UPDATED_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    LAST_REASON_FIELD_NUMBER: _ClassVar[int]
    DRIFT_FIELD_NUMBER: _ClassVar[int]
    PRIVACY_FIELD_NUMBER: _ClassVar[int]
    adapter: str
    updated: int
    skipped: int
    loss: float
    scores: _containers.ScalarMap[str, float]
    version: str
    last_reason: str
    drift: _containers.ScalarMap[str, float]
    privacy: Privacy
    def __init__(self, adapter: _Optional[str] = ..., updated: _Optional[int] = ..., skipped: _Optional[int] = ..., loss: _Optional[float] = ..., scores: _Optional[_Mapping[str, float]] = ..., version: _Optional[str] = ..., last_reason: _Optional[str] = ..., drift: _Optional[_Mapping[str, float]] = ..., privacy: _Optional[_Union[Privacy, _Mapping]] = ...) -> None: ...

class Privacy(_message.Message):
    __slots__ = ("protects", "spent", "budget", "delta", "sites")
    class SitesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    PROTECTS_FIELD_NUMBER: _ClassVar[int]
    SPENT_FIELD_NUMBER: _ClassVar[int]
    BUDGET_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    SITES_FIELD_NUMBER: _ClassVar[int]
    protects: str
    spent: float
    budget: float
    delta: float
    sites: _containers.ScalarMap[str, float]
    def __init__(self, protects: _Optional[str] = ..., spent: _Optional[float] = ..., budget: _Optional[float] = ..., delta: _Optional[float] = ..., sites: _Optional[_Mapping[str, float]] = ...) -> None: ...

class SiteStatus(_message.Message):
    __slots__ = ("state", "refused", "rows", "device", "quantization", "base_loads", "bytes_up", "bytes_down", "seconds_training", "seconds_answer", "last_drop_out")
    class RowsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    STATE_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    BASE_LOADS_FIELD_NUMBER: _ClassVar[int]
    BYTES_UP_FIELD_NUMBER: _ClassVar[int]
    BYTES_DOWN_FIELD_NUMBER: _ClassVar[int]
    SECONDS_TRAINING_FIELD_NUMBER: _ClassVar[int]
    SECONDS_ANSWER_FIELD_NUMBER: _ClassVar[int]
    LAST_DROP_OUT_FIELD_NUMBER: _ClassVar[int]
    state: str
    refused: str
    rows: _containers.ScalarMap[str, int]
    device: str
    quantization: str
    base_loads: int
    bytes_up: int
    bytes_down: int
    seconds_training: float
    seconds_answer: float
    last_drop_out: str
    def __init__(self, state: _Optional[str] = ..., refused: _Optional[str] = ..., rows: _Optional[_Mapping[str, int]] = ..., device: _Optional[str] = ..., quantization: _Optional[str] = ..., base_loads: _Optional[int] = ..., bytes_up: _Optional[int] = ..., bytes_down: _Optional[int] = ..., seconds_training: _Optional[float] = ..., seconds_answer: _Optional[float] = ..., last_drop_out: _Optional[str] = ...) -> None: ...

class EventsRequest(_message.Message):
    __slots__ = ("position", "follow")
    POSITION_FIELD_NUMBER: _ClassVar[int]
    FOLLOW_FIELD_NUMBER: _ClassVar[int]
    position: int
    follow: bool
    def __init__(self, position: _Optional[int] = ..., follow: _Optional[bool] = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("position", "time", "event", "facts")
    POSITION_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    EVENT_FIELD_NUMBER: _ClassVar[int]
    FACTS_FIELD_NUMBER: _ClassVar[int]
    position: int
    time: float
    event: str
    facts: str
    def __init__(self, position: _Optional[int] = ..., time: _Optional[float] = ..., event: _Optional[str] = ..., facts: _Optional[str] = ...) -> None: ...
