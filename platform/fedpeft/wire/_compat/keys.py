"""OpenSSH public keys as the SuperLink wants them: PEM. Flower's own reader ends the process when a file is no key."""

from __future__ import annotations

import base64
import struct
from pathlib import Path

from fedpeft.errors import ConfigError

PREFIXES = {
    "ecdsa-sha2-nistp256": "3059301306072a8648ce3d020106082a8648ce3d030107034200",
    "ecdsa-sha2-nistp384": "3076301006072a8648ce3d020106052b81040022036200",
    "ecdsa-sha2-nistp521": "30819b301006072a8648ce3d020106052b8104002303818600",
}
"""DER of a SubjectPublicKeyInfo (RFC 5480) up to the curve point, per curve."""
POINTS = {"ecdsa-sha2-nistp256": 65, "ecdsa-sha2-nistp384": 97, "ecdsa-sha2-nistp521": 133}


def pem(path: Path) -> bytes:
    """The PEM form of the OpenSSH ECDSA public key in ``path``. Raises `ConfigError` when there is none."""
    try:
        kind, encoded = path.read_text(encoding="ascii").split()[:2]
        name, _, point = fields(base64.b64decode(encoded, validate=True))
        if name.decode() != kind or len(point) != POINTS[kind] or point[0] != 4:
            raise ValueError(kind)
    except (OSError, ValueError, KeyError, struct.error) as fault:
        raise ConfigError(
            f"{path}: is not an OpenSSH ECDSA public key ({type(fault).__name__}); make one with ssh-keygen -t ecdsa -b 384"
        ) from None
    body = base64.b64encode(bytes.fromhex(PREFIXES[kind]) + point).decode()
    lines = [body[start : start + 64] for start in range(0, len(body), 64)]
    return "\n".join(["-----BEGIN PUBLIC KEY-----", *lines, "-----END PUBLIC KEY-----", ""]).encode()


def fields(blob: bytes) -> tuple[bytes, bytes, bytes]:
    """The three length-prefixed strings of an OpenSSH ECDSA key: its kind, its curve, its point (RFC 5656, section 3.1)."""
    found, start = [], 0
    while start < len(blob):
        (length,) = struct.unpack_from(">I", blob, start)
        found.append(blob[start + 4 : start + 4 + length])
        start += 4 + length
    kind, curve, point = found
    return kind, curve, point
