"""The CA's folder (creation, sharing, damage), what it issues, the SVID store, bundles, SPIFFE IDs."""

from __future__ import annotations

import datetime
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID
from cryptography.x509.verification import PolicyBuilder, Store
from hypothesis import given
from hypothesis import strategies as st

from netproxy.addr import SpiffeId, spiffe_id
from netproxy.config.shard import SvidShard, decode_shard, encode_shard
from netproxy.errors import IdentityError
from netproxy.identity.ca import CertificateAuthority, write_private
from netproxy.identity.spiffe import SpiffeVerifier, identity_of_der, leaf_identity, parse_id, split_id
from netproxy.identity.svid import SvidStore, issue_svid, new_key_pem, renew_at, validity
from netproxy.identity.trust import bundle_pem, check_root, parse_bundle, verify_chain

from .ends import DAY_S, REVIEWS, WEB, Mesh

NOW = 1_800_000_000.0
TD = "cluster.local"


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Mesh:
    return Mesh(tmp_path_factory.mktemp("ca"), now=NOW)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


# The folder.


def test_created_once_and_private(tmp_path: Path) -> None:
    folder = tmp_path / "state" / "ca"
    first = CertificateAuthority.open(folder, TD, now=NOW)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert set(before) == {"ca.key", "ca.pem", "lock"}
    assert mode(folder) == 0o700
    assert mode(folder / "ca.key") == 0o600
    again = CertificateAuthority.open(str(folder), TD, now=NOW + DAY_S)
    assert again.bundle_pem == first.bundle_pem == (folder / "ca.pem").read_text()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert TD in repr(again)


def test_root(mesh: Mesh) -> None:
    root = mesh.ca.certificate
    check_root(root, TD)
    assert isinstance(root.public_key(), ec.EllipticCurvePublicKey)
    assert root.not_valid_after_utc.timestamp() == NOW + 3650 * DAY_S
    usage = root.extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical
    assert usage.value.key_cert_sign
    assert usage.value.crl_sign
    assert not usage.value.digital_signature


def test_several_processes_create_one_root(tmp_path: Path) -> None:
    code = (
        "import sys; from netproxy.identity.ca import CertificateAuthority\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        f"print(CertificateAuthority.open(sys.argv[1], {TD!r}, now={NOW}).certificate.serial_number)"
    )
    pipe = subprocess.PIPE
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "ca")], stdin=pipe, stdout=pipe, text=True)
        for _ in range(5)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    serials = {process.communicate(timeout=60)[0] for process in processes}
    assert len(serials) == 1
    assert serials == {f"{CertificateAuthority.open(tmp_path / 'ca', TD, now=NOW).certificate.serial_number}\n"}
    assert {path.name for path in (tmp_path / "ca").iterdir()} == {"ca.key", "ca.pem", "lock"}


def test_interrupted_creation_is_finished_with_the_same_key(tmp_path: Path) -> None:
    first = CertificateAuthority.open(tmp_path, TD, now=NOW)
    key = (tmp_path / "ca.key").read_bytes()
    (tmp_path / "ca.pem").unlink()
    second = CertificateAuthority.open(tmp_path, TD, now=NOW)
    assert (tmp_path / "ca.key").read_bytes() == key
    assert first.certificate.public_key() == second.certificate.public_key()


@pytest.mark.parametrize(
    ("file", "content", "detail"),
    [
        ("ca.key", b"", "not a private key"),
        ("ca.key", b"nonsense", "not a private key"),
        ("ca.key", new_key_pem().encode(), "not that of the key"),
        ("ca.key", None, "missing"),
        ("ca.pem", b"", "not PEM"),
        ("ca.pem", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "not PEM"),
        ("ca.pem", b"\xff\xfe", "decode"),
        ("ca.pem", "leaf", "not signed itself"),
        ("ca.pem", "twice", "more than one"),
    ],
)
def test_damage_is_named_and_never_repaired(
    tmp_path: Path, file: str, content: bytes | str | None, detail: str
) -> None:
    ca = CertificateAuthority.open(tmp_path, TD, now=NOW)
    path = tmp_path / file
    if content == "leaf":
        content = issue_svid(ca, WEB, now=NOW).chain_pem.encode()
    elif content == "twice":
        content = path.read_bytes() * 2
    if content is None:
        path.unlink()
    else:
        assert isinstance(content, bytes)
        path.write_bytes(content)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(IdentityError, match=detail) as failure:
        CertificateAuthority.open(tmp_path, TD, now=NOW)
    assert str(tmp_path) in str(failure.value)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_other_reasons_to_refuse(tmp_path: Path) -> None:
    CertificateAuthority.open(tmp_path, TD, now=NOW)
    with pytest.raises(IdentityError, match=r"ca\.pem: the root is of the trust domain cluster\.local, not other"):
        CertificateAuthority.open(tmp_path, "other", now=NOW)
    with pytest.raises(IdentityError, match=r"ca\.pem: valid from"):
        CertificateAuthority.open(tmp_path, TD, now=NOW + 3651 * DAY_S)
    with pytest.raises(IdentityError, match="not a trust domain"):
        CertificateAuthority.open(tmp_path, "Not A Domain", now=NOW)
    (tmp_path / "ca.key").chmod(0o640)
    with pytest.raises(IdentityError, match=r"ca\.key: others .*0640"):
        CertificateAuthority.open(tmp_path, TD, now=NOW)
    (tmp_path / "file").write_text("")
    with pytest.raises(IdentityError, match=re.escape(str(tmp_path / "file"))):
        CertificateAuthority.open(tmp_path / "file", TD, now=NOW)


def test_write_private_leaves_the_old_file_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_private(path, b"old")
    (tmp_path / "b").mkdir()
    with pytest.raises(OSError):
        write_private(tmp_path / "b", b"new")
    assert path.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
    assert mode(path) == 0o600


# Leaves.


def test_leaf_is_an_x509_svid(mesh: Mesh) -> None:
    svid = mesh.svid(WEB)
    [leaf] = x509.load_pem_x509_certificates(svid.chain_pem.encode())
    extensions = {extension.oid: extension for extension in leaf.extensions}
    assert leaf.subject == x509.Name([])
    assert leaf.issuer == mesh.ca.certificate.subject
    assert leaf.version is x509.Version.v3
    assert leaf.serial_number.bit_length() > 64
    san = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert san.critical
    assert list(san.value) == [x509.UniformResourceIdentifier(WEB)]
    usage = leaf.extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical
    assert usage.value.digital_signature
    assert not usage.value.key_cert_sign
    assert not usage.value.crl_sign
    constraints = leaf.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert not constraints.value.ca
    assert set(leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == {
        ExtendedKeyUsageOID.SERVER_AUTH,
        ExtendedKeyUsageOID.CLIENT_AUTH,
    }
    root_ski = mesh.ca.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    aki = leaf.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value
    assert aki.key_identifier == root_ski.digest
    assert x509.SubjectKeyIdentifier.oid in extensions
    assert validity(svid.chain_pem) == (NOW - 20, NOW + DAY_S)
    assert svid.not_after == NOW + DAY_S
    assert leaf_identity(leaf) == svid.identity == WEB
    when = datetime.datetime.fromtimestamp(NOW, datetime.UTC)
    policy = PolicyBuilder().store(Store([mesh.ca.certificate])).time(when)
    verified = policy.build_client_verifier().verify(leaf, [])
    assert verified.chain == [leaf, mesh.ca.certificate]
    assert SpiffeVerifier(TD).identity(leaf.public_bytes(Encoding.DER)) == WEB
    assert decode_shard(svid.key(), encode_shard(svid)) == svid
    assert mesh.svid(WEB).key_pem != svid.key_pem


def test_leaf_from_requests_and_keys(mesh: Mesh) -> None:
    key = load_pem_private_key(new_key_pem().encode(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    # What the request asks for is not what decides.
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "admin")]))
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(REVIEWS)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    chain = mesh.ca.issue(WEB, request, now=NOW, ttl_s=60)
    leaf = verify_chain(chain, mesh.ca.bundle_pem, now=NOW)
    assert leaf_identity(leaf) == WEB
    assert leaf.subject == x509.Name([])
    assert leaf.public_key() == key.public_key()
    assert validity(chain)[1] == NOW + 60
    forged = bytearray(request.public_bytes(Encoding.DER))
    forged[-1] ^= 1
    for subject in (
        x509.load_der_x509_csr(bytes(forged)),
        rsa.generate_private_key(65537, 1024).public_key(),
        ec.generate_private_key(ec.SECP521R1()).public_key(),
        ed25519.Ed25519PrivateKey.generate().public_key(),
    ):
        with pytest.raises(IdentityError):
            mesh.ca.issue(WEB, subject, now=NOW)  # type: ignore[arg-type]
    mesh.ca.issue(WEB, rsa.generate_private_key(65537, 2048).public_key(), now=NOW)


def test_what_the_ca_refuses_to_sign(mesh: Mesh) -> None:
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    for identity in ("spiffe://other/ns/a/sa/b", "spiffe://cluster.local", "https://cluster.local/a", ""):
        with pytest.raises(IdentityError):
            mesh.ca.issue(SpiffeId(identity), key, now=NOW)
    with pytest.raises(IdentityError):
        mesh.ca.issue(WEB, key, now=NOW, ttl_s=0)
    with pytest.raises(IdentityError, match="expired"):
        mesh.ca.issue(WEB, key, now=NOW + 3651 * DAY_S)
    late = mesh.ca.issue(WEB, key, now=NOW + 3650 * DAY_S - 10)
    assert validity(late)[1] == NOW + 3650 * DAY_S


def hand_made(**changes: x509.ExtensionType | None) -> x509.Certificate:
    """A self-signed certificate that is a good leaf but for `changes`."""
    key = ec.generate_private_key(ec.SECP256R1())
    extensions: dict[str, x509.ExtensionType | None] = {
        "san": x509.SubjectAlternativeName([x509.UniformResourceIdentifier(WEB)]),
        "usage": usage_of("digital_signature"),
        "constraints": None,
        **changes,
    }
    when = datetime.datetime.fromtimestamp(NOW, datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(x509.Name([])).issuer_name(x509.Name([])).serial_number(7)
    builder = builder.public_key(key.public_key()).not_valid_before(when).not_valid_after(when)
    for extension in extensions.values():
        if extension is not None:
            builder = builder.add_extension(extension, critical=True)
    return builder.sign(key, hashes.SHA256())


def usage_of(*bits: str) -> x509.KeyUsage:
    names = (
        "digital_signature content_commitment key_encipherment data_encipherment key_agreement key_cert_sign "
        "crl_sign encipher_only decipher_only"
    )
    return x509.KeyUsage(**{name: name in bits for name in names.split()})


def uris(*values: str) -> x509.SubjectAlternativeName:
    return x509.SubjectAlternativeName([x509.UniformResourceIdentifier(value) for value in values])


def test_certificates_that_are_no_svids() -> None:
    assert leaf_identity(hand_made()) == WEB
    assert leaf_identity(hand_made(constraints=x509.BasicConstraints(ca=False, path_length=None))) == WEB
    with_dns = x509.SubjectAlternativeName([x509.DNSName("web"), x509.UniformResourceIdentifier(WEB)])
    assert leaf_identity(hand_made(san=with_dns)) == WEB
    for changes, detail in (
        ({"san": None}, "no subject alternative name"),
        ({"san": x509.SubjectAlternativeName([x509.DNSName("web")])}, "0 URI names"),
        ({"san": uris(WEB, REVIEWS)}, "2 URI names"),
        ({"san": uris("spiffe://cluster.local")}, "of a trust domain"),
        ({"san": uris("https://cluster.local/a")}, "not a SPIFFE ID"),
        ({"usage": None}, "no key usage"),
        ({"usage": usage_of("key_agreement")}, "wrong key usage"),
        ({"usage": usage_of("digital_signature", "key_cert_sign")}, "wrong key usage"),
        ({"usage": usage_of("digital_signature", "crl_sign")}, "wrong key usage"),
        ({"constraints": x509.BasicConstraints(ca=True, path_length=None)}, "is a CA's"),
    ):
        with pytest.raises(IdentityError, match=detail):
            identity_of_der(hand_made(**changes).public_bytes(Encoding.DER))
    with pytest.raises(IdentityError, match="can't be read"):
        identity_of_der(b"nonsense")
    verifier = SpiffeVerifier("elsewhere")
    with pytest.raises(IdentityError, match="not in the trust domain"):
        verifier.identity(hand_made().public_bytes(Encoding.DER))
    with pytest.raises(IdentityError, match="no certificate"):
        verifier.identity(None)


# SPIFFE IDs.


@pytest.mark.parametrize(
    "text",
    [
        "spiffe://cluster.local/ns/a/sa/b",
        "spiffe://td_1-x/p",
        "spiffe://10.0.0.1/A.b_c-d",
        "spiffe://td/..a/...",
        "spiffe://" + "t" * 255 + "/a",
    ],
)
def test_valid_ids(text: str) -> None:
    assert parse_id(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "spiffe://",
        "spiffe:///a",
        "spiffe://td",
        "spiffe://td/",
        "spiffe://td/a/",
        "spiffe://td//a",
        "spiffe://td/./a",
        "spiffe://td/a/..",
        "spiffe://td/a%20b",
        "spiffe://td/a?b",
        "spiffe://td/a#b",
        "spiffe://td/é",
        "spiffe://td/a\n",
        "spiffe://TD/a",
        "spiffe://td:1/a",
        "spiffe://u@td/a",
        "SPIFFE://td/a",
        "http://td/a",
        "td/a",
        "spiffe://" + "t" * 256 + "/a",
        "spiffe://td/" + "a" * 2048,
    ],
)
def test_invalid_ids(text: str) -> None:
    with pytest.raises(IdentityError):
        parse_id(text)


@given(
    st.text(alphabet="spife:/tdA.%?#-_é\n\0", max_size=30).map(lambda tail: f"spiffe://{tail}") | st.text(max_size=50)
)
def test_any_text_is_an_id_or_refused(text: str) -> None:
    try:
        domain, path = split_id(text)
    except IdentityError:
        return
    assert text == f"spiffe://{domain}{path}"
    assert text.isascii()
    assert text.isprintable()


# Bundles.


def test_bundles(tmp_path: Path, mesh: Mesh) -> None:
    old = Mesh(tmp_path / "old", now=NOW - 3649 * DAY_S)
    elsewhere = Mesh(tmp_path / "elsewhere", "elsewhere", now=NOW)
    both = bundle_pem([mesh.ca.certificate, old.ca.certificate, mesh.ca.certificate])
    assert both == bundle_pem([old.ca.certificate, mesh.ca.certificate])
    assert len(parse_bundle(both, trust_domain=TD)) == 2
    assert bundle_pem(parse_bundle(both)) == both
    for issuer in (mesh, old):
        verify_chain(issuer.svid(now=NOW).chain_pem, both, now=NOW)
    with pytest.raises(IdentityError, match="trust domain elsewhere"):
        parse_bundle(mesh.ca.bundle_pem + elsewhere.ca.bundle_pem, trust_domain=TD)
    for broken in ("", "nonsense", mesh.svid().chain_pem, mesh.ca.bundle_pem + mesh.svid().chain_pem):
        with pytest.raises(IdentityError):
            parse_bundle(broken)


def test_chains_that_do_not_verify(tmp_path: Path, mesh: Mesh) -> None:
    stranger = Mesh(tmp_path / "stranger", now=NOW)
    elsewhere = Mesh(tmp_path / "elsewhere", "elsewhere", now=NOW)
    chain = mesh.svid().chain_pem
    bundle = mesh.ca.bundle_pem
    verify_chain(chain, bundle, now=NOW)
    for chain_pem, roots, now in (
        (chain, stranger.ca.bundle_pem, NOW),
        (chain, bundle, NOW + DAY_S + 1),
        (chain, bundle, NOW - 60),
        (bundle, bundle, NOW),
        ("", bundle, NOW),
    ):
        with pytest.raises(IdentityError):
            verify_chain(chain_pem, roots, now=now)
    # A CA that signs for another trust domain: the signature is good, the right is not.
    overreaching = CertificateAuthority(elsewhere.ca._key, elsewhere.ca.certificate, TD)
    forged = issue_svid(overreaching, WEB, now=NOW).chain_pem
    with pytest.raises(IdentityError, match="trust domain"):
        verify_chain(forged, bundle + elsewhere.ca.bundle_pem, now=NOW)


# SVIDs.


def test_renewal_is_at_half_life_with_jitter(mesh: Mesh) -> None:
    svid = mesh.svid()
    rng = random.Random(1)
    times = [renew_at(svid, rng) for _ in range(500)]
    half = (DAY_S + 20) / 2
    assert NOW - 20 + 0.9 * half <= min(times) < NOW - 20 + 0.92 * half
    assert NOW - 20 + 1.08 * half < max(times) <= NOW - 20 + 1.1 * half


def test_store(tmp_path: Path, mesh: Mesh) -> None:
    store = SvidStore(tmp_path / "svids")
    assert store.load(WEB, now=NOW) is None
    svid = mesh.svid(WEB)
    store.save(mesh.svid(WEB))
    store.save(svid)
    store.save(mesh.svid(REVIEWS))
    assert mode(store.folder) == 0o700
    assert [mode(path) for path in store.folder.iterdir()] == [0o600, 0o600]
    assert store.load(WEB, now=NOW) == svid
    assert store.load(WEB, now=NOW + 0.66 * DAY_S) == svid
    assert store.load(WEB, now=NOW + 0.67 * DAY_S) is None
    assert store.load(WEB, now=NOW + 2 * DAY_S) is None
    assert store.load(WEB, now=NOW + 0.99 * DAY_S, due=True) == svid
    with pytest.raises(IdentityError, match="not valid"):
        store.load(WEB, now=NOW + 2 * DAY_S, due=True)
    rotated = Mesh(tmp_path / "new", now=NOW).ca.bundle_pem
    both = mesh.ca.bundle_pem + rotated
    assert store.load(WEB, now=NOW, bundle_pem=both) == replace(svid, bundle_pem=both)
    with pytest.raises(IdentityError, match=re.escape(str(store.path(WEB)))):
        store.load(WEB, now=NOW, bundle_pem=rotated)
    assert store.load(REVIEWS, now=NOW) is not None


def test_store_refuses_what_is_broken(tmp_path: Path, mesh: Mesh) -> None:
    store = SvidStore(tmp_path)
    svid, second = mesh.svid(WEB), mesh.svid(WEB)
    broken: list[SvidShard | bytes] = [
        b"",
        b"{}",
        b"\xff",
        replace(svid, key_pem=second.key_pem),
        replace(svid, key_pem="nonsense"),
        replace(svid, chain_pem="nonsense"),
        replace(svid, bundle_pem=""),
        replace(svid, not_after=svid.not_after + 1),
        replace(svid, identity=REVIEWS),
        mesh.svid(REVIEWS),
        replace(mesh.svid(REVIEWS), identity=WEB),
    ]
    for content in broken:
        store.path(WEB).write_bytes(content if isinstance(content, bytes) else encode_shard(content))
        with pytest.raises(IdentityError, match=re.escape(str(store.path(WEB)))):
            store.load(WEB, now=NOW)


def test_store_file_names() -> None:
    store = SvidStore("/folder")
    names = set()
    for identity in (
        WEB,
        REVIEWS,
        spiffe_id(TD, "a", "b/../../c"),
        spiffe_id(TD, "a-b", "c"),
        spiffe_id(TD, "a", "b-c"),
    ):
        path = store.path(identity)
        assert path.parent == Path("/folder")
        names.add(path.name)
    assert len(names) == 5
    assert len(store.path(SpiffeId("spiffe://td/" + "a" * 2000)).name) < 150
