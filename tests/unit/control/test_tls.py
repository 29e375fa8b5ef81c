"""Certificates and roles: who gets in, who may call what, and what is said to the others."""

from __future__ import annotations

import ssl
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import grpc
import pytest

from fedpeft import issuing
from fedpeft.certificates import holder, lapsing, read_holder
from fedpeft.control.address import Address, Identity
from fedpeft.control.channel import connect
from fedpeft.control.client import RemoteFederation
from fedpeft.control.roles import ALLOWED, ROLES, may
from fedpeft.errors import ConfigError, LinkError, PolicyError
from fedpeft.v1 import federation_pb2, registry_pb2, router_pb2
from fedpeft_coordinator.listening import Tls

pytestmark = pytest.mark.integration


def test_every_method_has_roles_and_every_role_is_one():
    methods = {
        f"/{service.full_name}/{method.name}"
        for file in (registry_pb2, router_pb2, federation_pb2)
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    assert methods == {name for name in ALLOWED if name.startswith("/fedpeft.")}
    assert all(roles and roles <= set(ROLES) for roles in ALLOWED.values())
    assert not may("operator", "/fedpeft.v1.Registry/Delete")
    assert not may("", "/fedpeft.v1.Registry/Get")
    assert [role for role in ROLES if may(role, "/fedpeft.v1.Registry/Push")] == ["publisher", "operator"]


def test_who_issues_and_the_table_know_the_same_roles():
    assert issuing.ROLES == ROLES


def test_certificates_hold_where_rules_are_strict(certificates):
    """As Python 3.13 and newer check them by default."""
    ours = certificates / "ours"
    ends = []
    for purpose, pair in ((ssl.Purpose.CLIENT_AUTH, "server"), (ssl.Purpose.SERVER_AUTH, "reader-ann")):
        context = ssl.create_default_context(purpose, cafile=str(ours / "ca.crt"))
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_cert_chain(ours / f"{pair}.pem", ours / f"{pair}.key")
        ends.append((context, ssl.MemoryBIO(), ssl.MemoryBIO()))
    (listening, a, b), (calling, _, _) = ends
    server = listening.wrap_bio(a, b, server_side=True)
    client = calling.wrap_bio(b, a, server_hostname="localhost")
    for _ in range(3):
        for side in (client, server):
            with suppress(ssl.SSLWantReadError):
                side.do_handshake()
    assert client.getpeercert()["subject"] == ((("commonName", "localhost"),),)
    assert server.getpeercert()["subjectAltName"] == (("URI", "fedpeft:reader:ann"),)


def test_roles_are_the_certificates(secure, certificates, tmp_path, made):
    ours = certificates / "ours"
    far = {role: secure.far(tmp_path / role, Identity.beside(ours / f"{role}-{name}.pem")) for role, name in WHO.items()}
    for role in WHO:
        assert far[role].get("area").number == 2
    assert far["publisher"].alias("area", "prod", "1").by == "publisher:trainer"
    for role in ("reader", "site", "monitor", "publisher"):
        with pytest.raises(PolicyError, match=rf"role '{role}' .* may not call fedpeft.v1.Registry/Rollback; \['operator'\] may"):
            far[role].rollback("area", "1")
    assert far["operator"].rollback("area", "prod").number == 3
    with pytest.raises(PolicyError, match=r"may not call fedpeft.v1.Federation/Status"):
        RemoteFederation(far["site"].link).status()
    for one in far.values():
        one.link.__exit__()


WHO = {"reader": "ann", "site": "clinic", "publisher": "trainer", "monitor": "grafana", "operator": "root"}


def test_another_cas_certificate_is_named_on_either_side(secure, certificates, tmp_path):
    eve = Identity(certificates / "other/operator-eve.pem", certificates / "other/operator-eve.key", certificates / "ours/ca.crt")
    with pytest.raises(PolicyError, match=r"does not take the certificate .*operator-eve.pem, which is not signed by"):
        secure.far(tmp_path / "a", eve).get("area")
    fooled = Identity.beside(certificates / "other/operator-eve.pem")
    with pytest.raises(LinkError, match=r"its certificate does not hold"):
        secure.far(tmp_path / "b", fooled).get("area")


def test_a_server_under_another_name_is_not_believed(serve, certificates, tmp_path):
    other = certificates / "other"
    running = serve(tls=Tls(ca=other / "ca.crt", cert=other / "server.pem", key=other / "server.key"))
    with pytest.raises(LinkError, match=r"does not hold: IP address mismatch"):
        running.far(tmp_path / "c", Identity.beside(other / "operator-eve.pem")).get("area")


def test_without_tls_nobody_gets_in(secure, tmp_path):
    with pytest.raises(LinkError):
        secure.far(tmp_path / "a").get("area")


def test_a_certificate_without_a_role_is_unauthenticated(secure, certificates):
    ours = certificates / "ours"
    ca = issuing.authority_of(ours, 1)
    bare = issuing.end("nobody", [issuing.alternative("nobody.example.org")], issuing.ExtendedKeyUsageOID.CLIENT_AUTH, ca, 1)
    if not (ours / "bare.pem").exists():
        issuing.keep(ours, "bare", bare)
    identity = Identity.beside(ours / "bare.pem")
    with pytest.raises(PolicyError, match="names no role"):
        connect(Address("127.0.0.1", secure.port), identity)
    files = [path.read_bytes() for path in (identity.ca, identity.key, identity.cert)]
    with grpc.secure_channel(f"127.0.0.1:{secure.port}", grpc.ssl_channel_credentials(*files)) as channel:
        from fedpeft.v1.registry_pb2_grpc import RegistryStub

        with pytest.raises(grpc.RpcError) as caught:
            RegistryStub(channel).Get(registry_pb2.GetRequest(ref="area"), timeout=10)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert "names no role" in caught.value.details()


def test_an_expired_certificate_is_named_before_and_during_a_connection(secure, certificates, tmp_path, monkeypatch):
    ours = certificates / "ours"
    if not (ours / "reader-late.pem").exists():
        issuing.client(ours, "reader:late", issuing.authority_of(ours, 1), 0)
    late = Identity.beside(ours / "reader-late.pem")
    with pytest.raises(PolicyError, match=r"reader-late.pem: expired on .*; issue a new one"):
        secure.far(tmp_path / "a", late).get("area")
    monkeypatch.setattr(Identity, "check", lambda _self: None)
    with pytest.raises(PolicyError, match=r"does not take the certificate .*expired"):
        secure.far(tmp_path / "b", late).get("area")
    ann = secure.far(tmp_path / "c", Identity.beside(ours / "reader-ann.pem"))
    assert ann.get("area").number == 2
    secure.server.gate.revoked = frozenset({"reader:ann"})
    with pytest.raises(PolicyError, match="the certificate of reader:ann was revoked"):
        ann.get("area")
    real = next(iter(secure.server.gate._known))
    secure.server.gate._known[real] = holder(late.cert.read_bytes())
    with pytest.raises(PolicyError, match=r"the certificate of reader:late expired on .*UNAUTHENTICATED"):
        ann.get("area")


@pytest.fixture
def tokened(serve, made, certificates, tmp_path):
    """A server that asks for tokens, and a file of tokens that the test may change."""
    ours = certificates / "ours"
    (tmp_path / "tokens").write_bytes((ours / "tokens").read_bytes())
    running = serve(tls=Tls(ca=ours / "ca.crt", cert=ours / "server.pem", key=ours / "server.key"), tokens=tmp_path / "tokens")
    made.fill(running.registry, 1, 2)
    return running


def test_a_token_speaks_for_a_role_until_it_is_taken_back(tokened, certificates, tmp_path, caplog):
    ours = certificates / "ours"
    phone, robot = (tokened.far(tmp_path / who, Identity.beside(ours / f"{who}.token")) for who in ("reader-phone", "publisher-robot"))
    assert phone.get("area").number == 2
    assert robot.alias("area", "prod", "1").by == "publisher:robot"
    with pytest.raises(PolicyError, match=r"role 'reader' \(phone\) may not call fedpeft.v1.Registry/SetAlias"):
        phone.alias("area", "prod", "2")
    lines = (tmp_path / "tokens").read_text().splitlines()
    for text, said in [
        ("\n".join(lines[1:]), "this token is not known here"),
        (lines[0][:-10] + "2020-01-01", "the token of reader:phone expired on 2020-01-01"),
        ("torn", "tokens cannot be read here now"),
    ]:
        (tmp_path / "tokens").write_text(text)
        with pytest.raises(PolicyError, match=said):
            phone.get("area")
    assert "lines [1] are not ROLE:NAME SHA256" in caplog.text
    assert Identity.beside(ours / "reader-phone.token").secret not in caplog.text
    (tmp_path / "tokens").write_text("\n".join(lines))
    assert phone.get("area").number == 2
    tokened.server.gate.revoked = frozenset({"reader:phone"})
    with pytest.raises(PolicyError, match="the token of reader:phone was revoked"):
        phone.get("area")
    with pytest.raises(PolicyError, match="no token was shown"):
        tokened.far(tmp_path / "c", Identity.beside(ours / "reader-ann.pem")).get("area")


def test_a_token_is_kept_and_shown_with_care(secure, certificates, tmp_path):
    phone = Identity.beside(certificates / "ours/reader-phone.token")
    with pytest.raises(PolicyError, match=r"asks for a certificate \(NAME.pem\), not for a token"):
        secure.far(tmp_path / "a", phone).get("area")
    for text, mode, said in [
        ("x", 0o644, "can be read by others; run chmod 600"),
        ("", 0o600, "holds no token"),
        ("a b", 0o600, "holds no"),
    ]:
        (tmp_path / "x.token").write_text(text)
        (tmp_path / "x.token").chmod(mode)
        with pytest.raises(ConfigError, match=said):
            connect(Address("127.0.0.1", 1), Identity(None, None, phone.ca, tmp_path / "x.token"))


def test_whoever_uses_a_certificate_is_told_before_it_ends(tmp_path):
    issuing.issue(tmp_path / "keys", ["localhost"], [])
    path = tmp_path / "keys/server.pem"
    end = read_holder(path).until
    assert [lapsing(path), lapsing(path, end - timedelta(days=30, hours=1))] == ["", ""]
    assert lapsing(path, end - timedelta(days=29, hours=1)) == f"{path} holds for 29 days only; issue a new one with `fedpeft certificates`"
    with pytest.raises(PolicyError, match=r"server\.pem: expired on"):
        lapsing(path, end + timedelta(seconds=1))
    assert read_holder(tmp_path / "keys/ca.crt").until - end > timedelta(days=3000)


def test_holders(certificates, tmp_path):
    found = read_holder(certificates / "ours/site-clinic.pem")
    assert (found.role, found.name, found.fault()) == ("site", "clinic", None)
    assert "is not valid before" in str(found.fault(datetime.now(UTC) - timedelta(days=1)))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_holder(tmp_path / "none")
    (tmp_path / "junk").write_text("junk")
    with pytest.raises(ConfigError, match="is no PEM certificate"):
        read_holder(tmp_path / "junk")


def test_beyond_loopback_a_caller_must_mean_it(tmp_path):
    with pytest.raises(PolicyError, match="give --identity"):
        connect(Address("10.9.8.7", 1), None)
    connect(Address("10.9.8.7", 1, insecure=True), None).close()
    with pytest.raises(ConfigError, match="do not exist"):
        connect(Address("10.9.8.7", 1), Identity.beside(tmp_path / "x.pem"))
