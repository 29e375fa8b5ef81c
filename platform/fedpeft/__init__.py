"""Federated and distributed multi-task PEFT: small task adapters on data that never moves."""

__version__ = "0.1.0"
