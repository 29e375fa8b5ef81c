"""Tasks: rows of text to examples, batches, losses and scores. Importing this imports no torch."""

from fedpeft.tasks.choice import Choice
from fedpeft.tasks.classification import Classification
from fedpeft.tasks.generation import Generation
from fedpeft.tasks.metrics import METRICS, Counters
from fedpeft.tasks.protocol import Batch, Encoded, Loss, Row, Task
from fedpeft.tasks.rows import Source, read_rows

TASKS: dict[str, type[Task]] = {"classification": Classification, "generation": Generation, "choice": Choice}

__all__ = [
    "METRICS",
    "TASKS",
    "Batch",
    "Choice",
    "Classification",
    "Counters",
    "Encoded",
    "Generation",
    "Loss",
    "Row",
    "Source",
    "Task",
    "read_rows",
]
