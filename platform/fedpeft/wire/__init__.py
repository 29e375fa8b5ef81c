"""What travels: protobuf messages, flat arrays, and their carriage over Flower."""

from fedpeft.wire.envelope import Envelope

__all__ = ["Envelope"]
