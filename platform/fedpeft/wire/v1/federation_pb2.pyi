from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Hello(_message.Message):
    __slots__ = ("federation", "version", "tasks", "task_blind")
    FEDERATION_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    TASK_BLIND_FIELD_NUMBER: _ClassVar[int]
    federation: str
    version: str
    tasks: _containers.RepeatedScalarFieldContainer[str]
    task_blind: bool
    def __init__(self, federation: _Optional[str] = ..., version: _Optional[str] = ..., tasks: _Optional[_Iterable[str]] = ..., task_blind: _Optional[bool] = ...) -> None: ...

class Capabilities(_message.Message):
    __slots__ = ("site", "version", "holdings", "base_identity", "quantization", "device", "base_loads", "instance")
    SITE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    HOLDINGS_FIELD_NUMBER: _ClassVar[int]
    BASE_IDENTITY_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    BASE_LOADS_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    site: str
    version: str
    holdings: _containers.RepeatedCompositeFieldContainer[Holding]
    base_identity: str
    quantization: str
    device: str
    base_loads: int
    instance: str
    def __init__(self, site: _Optional[str] = ..., version: _Optional[str] = ..., holdings: _Optional[_Iterable[_Union[Holding, _Mapping]]] = ..., base_identity: _Optional[str] = ..., quantization: _Optional[str] = ..., device: _Optional[str] = ..., base_loads: _Optional[int] = ..., instance: _Optional[str] = ...) -> None: ...

class Holding(_message.Message):
    __slots__ = ("task", "train_examples", "test_examples", "adapter_digest")
    TASK_FIELD_NUMBER: _ClassVar[int]
    TRAIN_EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    TEST_EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    task: str
    train_examples: int
    test_examples: int
    adapter_digest: str
    def __init__(self, task: _Optional[str] = ..., train_examples: _Optional[int] = ..., test_examples: _Optional[int] = ..., adapter_digest: _Optional[str] = ...) -> None: ...

class RoundPlan(_message.Message):
    __slots__ = ("federation", "run", "round", "tasks")
    FEDERATION_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    federation: str
    run: str
    round: int
    tasks: _containers.RepeatedCompositeFieldContainer[TaskPlan]
    def __init__(self, federation: _Optional[str] = ..., run: _Optional[str] = ..., round: _Optional[int] = ..., tasks: _Optional[_Iterable[_Union[TaskPlan, _Mapping]]] = ...) -> None: ...

class TaskPlan(_message.Message):
    __slots__ = ("task", "task_json", "spec_json", "scheme_json", "phase", "roles", "adapter_digest", "previous_digest", "down_roles", "settings_json", "seed", "weight_cap", "grid_sites", "grid_reach", "cohort", "secure_aggregation", "want_embedding", "centroids", "task_round", "control_digest", "counted_round", "masking", "codec_json", "task_blind", "scales", "privacy_json", "down_codec_json", "gates", "want_moments", "own", "pool", "want_ngrams", "encoder")
    TASK_FIELD_NUMBER: _ClassVar[int]
    TASK_JSON_FIELD_NUMBER: _ClassVar[int]
    SPEC_JSON_FIELD_NUMBER: _ClassVar[int]
    SCHEME_JSON_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    ROLES_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    DOWN_ROLES_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_JSON_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_CAP_FIELD_NUMBER: _ClassVar[int]
    GRID_SITES_FIELD_NUMBER: _ClassVar[int]
    GRID_REACH_FIELD_NUMBER: _ClassVar[int]
    COHORT_FIELD_NUMBER: _ClassVar[int]
    SECURE_AGGREGATION_FIELD_NUMBER: _ClassVar[int]
    WANT_EMBEDDING_FIELD_NUMBER: _ClassVar[int]
    CENTROIDS_FIELD_NUMBER: _ClassVar[int]
    TASK_ROUND_FIELD_NUMBER: _ClassVar[int]
    CONTROL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    COUNTED_ROUND_FIELD_NUMBER: _ClassVar[int]
    MASKING_FIELD_NUMBER: _ClassVar[int]
    CODEC_JSON_FIELD_NUMBER: _ClassVar[int]
    TASK_BLIND_FIELD_NUMBER: _ClassVar[int]
    SCALES_FIELD_NUMBER: _ClassVar[int]
    PRIVACY_JSON_FIELD_NUMBER: _ClassVar[int]
    DOWN_CODEC_JSON_FIELD_NUMBER: _ClassVar[int]
    GATES_FIELD_NUMBER: _ClassVar[int]
    WANT_MOMENTS_FIELD_NUMBER: _ClassVar[int]
    OWN_FIELD_NUMBER: _ClassVar[int]
    POOL_FIELD_NUMBER: _ClassVar[int]
    WANT_NGRAMS_FIELD_NUMBER: _ClassVar[int]
    ENCODER_FIELD_NUMBER: _ClassVar[int]
    task: str
    task_json: str
    spec_json: str
    scheme_json: str
    phase: str
    roles: _containers.RepeatedScalarFieldContainer[str]
    adapter_digest: str
    previous_digest: str
    down_roles: _containers.RepeatedScalarFieldContainer[str]
    settings_json: str
    seed: int
    weight_cap: int
    grid_sites: int
    grid_reach: float
    cohort: int
    secure_aggregation: bool
    want_embedding: bool
    centroids: _containers.RepeatedCompositeFieldContainer[Centroid]
    task_round: int
    control_digest: str
    counted_round: int
    masking: Masking
    codec_json: str
    task_blind: bool
    scales: bytes
    privacy_json: str
    down_codec_json: str
    gates: Gates
    want_moments: bool
    own: Spread
    pool: Spread
    want_ngrams: bool
    encoder: str
    def __init__(self, task: _Optional[str] = ..., task_json: _Optional[str] = ..., spec_json: _Optional[str] = ..., scheme_json: _Optional[str] = ..., phase: _Optional[str] = ..., roles: _Optional[_Iterable[str]] = ..., adapter_digest: _Optional[str] = ..., previous_digest: _Optional[str] = ..., down_roles: _Optional[_Iterable[str]] = ..., settings_json: _Optional[str] = ..., seed: _Optional[int] = ..., weight_cap: _Optional[int] = ..., grid_sites: _Optional[int] = ..., grid_reach: _Optional[float] = ..., cohort: _Optional[int] = ..., secure_aggregation: _Optional[bool] = ..., want_embedding: _Optional[bool] = ..., centroids: _Optional[_Iterable[_Union[Centroid, _Mapping]]] = ..., task_round: _Optional[int] = ..., control_digest: _Optional[str] = ..., counted_round: _Optional[int] = ..., masking: _Optional[_Union[Masking, _Mapping]] = ..., codec_json: _Optional[str] = ..., task_blind: _Optional[bool] = ..., scales: _Optional[bytes] = ..., privacy_json: _Optional[str] = ..., down_codec_json: _Optional[str] = ..., gates: _Optional[_Union[Gates, _Mapping]] = ..., want_moments: _Optional[bool] = ..., own: _Optional[_Union[Spread, _Mapping]] = ..., pool: _Optional[_Union[Spread, _Mapping]] = ..., want_ngrams: _Optional[bool] = ..., encoder: _Optional[str] = ...) -> None: ...

class Spread(_message.Message):
    __slots__ = ("count", "mean", "triangle", "ngrams")
    COUNT_FIELD_NUMBER: _ClassVar[int]
    MEAN_FIELD_NUMBER: _ClassVar[int]
    TRIANGLE_FIELD_NUMBER: _ClassVar[int]
    NGRAMS_FIELD_NUMBER: _ClassVar[int]
    count: float
    mean: bytes
    triangle: bytes
    ngrams: bytes
    def __init__(self, count: _Optional[float] = ..., mean: _Optional[bytes] = ..., triangle: _Optional[bytes] = ..., ngrams: _Optional[bytes] = ...) -> None: ...

class Gates(_message.Message):
    __slots__ = ("steps", "lr")
    STEPS_FIELD_NUMBER: _ClassVar[int]
    LR_FIELD_NUMBER: _ClassVar[int]
    steps: int
    lr: float
    def __init__(self, steps: _Optional[int] = ..., lr: _Optional[float] = ...) -> None: ...

class Masking(_message.Message):
    __slots__ = ("step", "name", "instance", "bundles", "dealers", "boxes", "survivors", "signatures", "counters")
    class Step(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STEP_UNSPECIFIED: _ClassVar[Masking.Step]
        STEP_KEYS: _ClassVar[Masking.Step]
        STEP_SHARES: _ClassVar[Masking.Step]
        STEP_VECTOR: _ClassVar[Masking.Step]
        STEP_AGREE: _ClassVar[Masking.Step]
        STEP_REVEAL: _ClassVar[Masking.Step]
    STEP_UNSPECIFIED: Masking.Step
    STEP_KEYS: Masking.Step
    STEP_SHARES: Masking.Step
    STEP_VECTOR: Masking.Step
    STEP_AGREE: Masking.Step
    STEP_REVEAL: Masking.Step
    class SignaturesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    STEP_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    BUNDLES_FIELD_NUMBER: _ClassVar[int]
    DEALERS_FIELD_NUMBER: _ClassVar[int]
    BOXES_FIELD_NUMBER: _ClassVar[int]
    SURVIVORS_FIELD_NUMBER: _ClassVar[int]
    SIGNATURES_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    step: Masking.Step
    name: str
    instance: Instance
    bundles: _containers.RepeatedCompositeFieldContainer[Bundle]
    dealers: _containers.RepeatedScalarFieldContainer[str]
    boxes: _containers.RepeatedCompositeFieldContainer[Box]
    survivors: _containers.RepeatedScalarFieldContainer[str]
    signatures: _containers.ScalarMap[str, bytes]
    counters: _containers.ScalarMap[str, int]
    def __init__(self, step: _Optional[_Union[Masking.Step, str]] = ..., name: _Optional[str] = ..., instance: _Optional[_Union[Instance, _Mapping]] = ..., bundles: _Optional[_Iterable[_Union[Bundle, _Mapping]]] = ..., dealers: _Optional[_Iterable[str]] = ..., boxes: _Optional[_Iterable[_Union[Box, _Mapping]]] = ..., survivors: _Optional[_Iterable[str]] = ..., signatures: _Optional[_Mapping[str, bytes]] = ..., counters: _Optional[_Mapping[str, int]] = ...) -> None: ...

class Instance(_message.Message):
    __slots__ = ("name", "members", "colluding", "dropping", "least")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    COLLUDING_FIELD_NUMBER: _ClassVar[int]
    DROPPING_FIELD_NUMBER: _ClassVar[int]
    LEAST_FIELD_NUMBER: _ClassVar[int]
    name: str
    members: _containers.RepeatedScalarFieldContainer[str]
    colluding: float
    dropping: float
    least: int
    def __init__(self, name: _Optional[str] = ..., members: _Optional[_Iterable[str]] = ..., colluding: _Optional[float] = ..., dropping: _Optional[float] = ..., least: _Optional[int] = ...) -> None: ...

class Bundle(_message.Message):
    __slots__ = ("site", "mask_key", "box_key", "seed_check", "signature")
    SITE_FIELD_NUMBER: _ClassVar[int]
    MASK_KEY_FIELD_NUMBER: _ClassVar[int]
    BOX_KEY_FIELD_NUMBER: _ClassVar[int]
    SEED_CHECK_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    site: str
    mask_key: bytes
    box_key: bytes
    seed_check: bytes
    signature: bytes
    def __init__(self, site: _Optional[str] = ..., mask_key: _Optional[bytes] = ..., box_key: _Optional[bytes] = ..., seed_check: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class Box(_message.Message):
    __slots__ = ("sender", "recipient", "payload")
    SENDER_FIELD_NUMBER: _ClassVar[int]
    RECIPIENT_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    sender: str
    recipient: str
    payload: bytes
    def __init__(self, sender: _Optional[str] = ..., recipient: _Optional[str] = ..., payload: _Optional[bytes] = ...) -> None: ...

class Reveal(_message.Message):
    __slots__ = ("seed", "seeds", "keys")
    class SeedsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    class KeysEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    SEED_FIELD_NUMBER: _ClassVar[int]
    SEEDS_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    seed: bytes
    seeds: _containers.ScalarMap[str, bytes]
    keys: _containers.ScalarMap[str, bytes]
    def __init__(self, seed: _Optional[bytes] = ..., seeds: _Optional[_Mapping[str, bytes]] = ..., keys: _Optional[_Mapping[str, bytes]] = ...) -> None: ...

class Masked(_message.Message):
    __slots__ = ("bundle", "counters", "boxes", "signature", "reveal")
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    BOXES_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    REVEAL_FIELD_NUMBER: _ClassVar[int]
    bundle: Bundle
    counters: _containers.ScalarMap[str, int]
    boxes: _containers.RepeatedCompositeFieldContainer[Box]
    signature: bytes
    reveal: Reveal
    def __init__(self, bundle: _Optional[_Union[Bundle, _Mapping]] = ..., counters: _Optional[_Mapping[str, int]] = ..., boxes: _Optional[_Iterable[_Union[Box, _Mapping]]] = ..., signature: _Optional[bytes] = ..., reveal: _Optional[_Union[Reveal, _Mapping]] = ...) -> None: ...

class Centroid(_message.Message):
    __slots__ = ("task", "values")
    TASK_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    task: str
    values: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, task: _Optional[str] = ..., values: _Optional[_Iterable[float]] = ...) -> None: ...

class RoundReply(_message.Message):
    __slots__ = ("site", "run", "round", "results", "base_loads", "instance")
    SITE_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    BASE_LOADS_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    site: str
    run: str
    round: int
    results: _containers.RepeatedCompositeFieldContainer[TaskResult]
    base_loads: int
    instance: str
    def __init__(self, site: _Optional[str] = ..., run: _Optional[str] = ..., round: _Optional[int] = ..., results: _Optional[_Iterable[_Union[TaskResult, _Mapping]]] = ..., base_loads: _Optional[int] = ..., instance: _Optional[str] = ...) -> None: ...

class TaskResult(_message.Message):
    __slots__ = ("task", "status", "reason", "weight", "counters", "layout_fingerprint", "train_seconds", "adapter_digest", "masked", "epsilon", "rests")
    class Status(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STATUS_UNSPECIFIED: _ClassVar[TaskResult.Status]
        STATUS_OK: _ClassVar[TaskResult.Status]
        STATUS_REFUSED: _ClassVar[TaskResult.Status]
        STATUS_FAILED: _ClassVar[TaskResult.Status]
        STATUS_MISSING_VERSION: _ClassVar[TaskResult.Status]
        STATUS_RESTING: _ClassVar[TaskResult.Status]
    STATUS_UNSPECIFIED: TaskResult.Status
    STATUS_OK: TaskResult.Status
    STATUS_REFUSED: TaskResult.Status
    STATUS_FAILED: TaskResult.Status
    STATUS_MISSING_VERSION: TaskResult.Status
    STATUS_RESTING: TaskResult.Status
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Values
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Values, _Mapping]] = ...) -> None: ...
    TASK_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TRAIN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    MASKED_FIELD_NUMBER: _ClassVar[int]
    EPSILON_FIELD_NUMBER: _ClassVar[int]
    RESTS_FIELD_NUMBER: _ClassVar[int]
    task: str
    status: TaskResult.Status
    reason: str
    weight: float
    counters: _containers.MessageMap[str, Values]
    layout_fingerprint: str
    train_seconds: float
    adapter_digest: str
    masked: Masked
    epsilon: float
    rests: int
    def __init__(self, task: _Optional[str] = ..., status: _Optional[_Union[TaskResult.Status, str]] = ..., reason: _Optional[str] = ..., weight: _Optional[float] = ..., counters: _Optional[_Mapping[str, Values]] = ..., layout_fingerprint: _Optional[str] = ..., train_seconds: _Optional[float] = ..., adapter_digest: _Optional[str] = ..., masked: _Optional[_Union[Masked, _Mapping]] = ..., epsilon: _Optional[float] = ..., rests: _Optional[int] = ...) -> None: ...

class Values(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, values: _Optional[_Iterable[float]] = ...) -> None: ...
