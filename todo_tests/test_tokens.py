"""Which bearer tokens are logins: section 7 of the design, RFC 8725, FR-001 to FR-004, SC-003."""

import base64
import hashlib
import hmac
import itertools
import json
import logging
import re
import time
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt.algorithms import get_default_algorithms

from todo_tests.better_auth import GENERATE, Issuer, Key
from todo_tests.support import (
    BEARER,
    SECRET,
    Serve,
    Server,
    assert_error,
    client_of,
    get,
    new_user,
    path_of,
    servers,
)

pytestmark = pytest.mark.anyio

LIMIT = 16 * 1024
CHALLENGES = {
    "AUTHENTICATION_REQUIRED": "Bearer",
    "INVALID_TOKEN": BEARER,
    "TOKEN_EXPIRED": BEARER,
}


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def segment(value: object) -> str:
    """A segment of a token: of bytes as they are, else of JSON."""
    return b64(value if isinstance(value, bytes) else json.dumps(value).encode())


def hs256(text: str, secret: bytes = SECRET.encode()) -> str:
    return b64(hmac.digest(secret, text.encode(), "sha256"))


class Forger:
    """Makes tokens for the user, honest ones unless told otherwise."""

    def __init__(self, user: str, issuer: Issuer, stranger: Issuer) -> None:
        self.user = user
        self.issuer = issuer
        self.stranger = stranger
        self.now = int(time.time())
        self.keys = {key.algorithm: key for key in issuer.keys}

    def claims(self, **claims: object) -> dict[str, object]:
        """What a tutorial's route signs with the shared secret; `...` leaves a claim out."""
        honest = {"sub": self.user, "iat": self.now, "exp": self.now + 900, **claims}
        return {name: value for name, value in honest.items() if value is not ...}

    def issued(self, **claims: object) -> dict[str, object]:
        """What the jwt plugin of Better Auth signs with a key of its JWKS."""
        origin = self.issuer.url
        return self.claims(**{"iss": origin, "aud": origin, "id": self.user, **claims})

    def shared(self, header: object = None, secret: bytes = SECRET.encode(), **claims: Any) -> str:
        """A token under the shared secret, with members added to its header, or instead of it."""
        if header is None or isinstance(header, dict):
            header = {"alg": "HS256", **(header or {})}
        return self.raw(header, self.claims(**claims), secret)

    def raw(self, header: object, payload: object, secret: bytes = SECRET.encode()) -> str:
        """A token under the shared secret of any header and payload, even of bytes."""
        text = f"{segment(header)}.{segment(payload)}"
        return f"{text}.{hs256(text, secret)}"

    def text(self, **claims: str) -> str:
        """A token under the shared secret whose claims are JSON text, for what JSON cannot say."""
        members = {name: json.dumps(value) for name, value in self.claims().items()} | claims
        payload = ",".join(f'"{name}":{value}' for name, value in members.items())
        return self.raw({"alg": "HS256"}, f"{{{payload}}}".encode())

    def signed(self, by: str = "EdDSA", header: dict[str, Any] | None = None, **claims: Any) -> str:
        """A token by a key of the JWKS, with members added to its header."""
        key = self.keys[by]
        return self.by(key.private, {"alg": by, "kid": key.kid, **(header or {})}, **claims)

    def by(self, private: Any, header: dict[str, Any], using: str = "", **claims: Any) -> str:
        """A token by any private key, whatever its header says."""
        header = {name: value for name, value in header.items() if value is not ...}
        text = f"{segment(header)}.{segment(self.issued(**claims))}"
        algorithm: Any = get_default_algorithms()[using or header["alg"]]
        return f"{text}.{b64(algorithm.sign(text.encode(), private))}"

    def of_length(self, length: int) -> str:
        """A good token of so many characters."""
        for size, kid in itertools.product(range(length * 3 // 4, 0, -1), ("", "1", "12")):
            if len(token := self.shared({"kid": kid}, name="x" * size)) == length:
                return token
            if len(token) < length - 8:
                break
        raise AssertionError("no such length")


@pytest.fixture(scope="module")
def issuer() -> Iterator[Issuer]:
    """Better Auth, by its JWKS: one key of each algorithm."""
    issuer = Issuer(*(Key(algorithm) for algorithm in GENERATE))
    yield issuer
    issuer.away()


@pytest.fixture(scope="module")
def stranger() -> Iterator[Issuer]:
    """Somebody else with keys and a JWKS."""
    stranger = Issuer(*(Key(algorithm) for algorithm in GENERATE))
    yield stranger
    stranger.away()


@pytest.fixture(scope="module")
async def client(make_settings: Any, issuer: Issuer) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(make_settings(better_auth_url=issuer.url)) as client:
        yield client


@pytest.fixture
def forger(user: str, issuer: Issuer, stranger: Issuer) -> Forger:
    return Forger(user, issuer, stranger)


@pytest.fixture
def app_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """The app's log, which does not go through the root logger."""
    log = logging.getLogger("todo")
    log.addHandler(caplog.handler)
    yield caplog
    log.removeHandler(caplog.handler)


Forge = Callable[[Forger], str]

ACCEPTED: dict[str, Forge] = {
    "tutorial": lambda f: f.shared(),
    "tutorial with e-mail": lambda f: f.shared(email="demo@example.com"),
    "typ JWT": lambda f: f.shared({"typ": "JWT"}),
    "HS256 with any kid": lambda f: f.shared({"kid": "../../dev/null"}),
    "HS256 with a kid of the JWKS": lambda f: f.shared({"kid": f.keys["RS256"].kid}),
    "HS256 with any iss": lambda f: f.shared(iss="https://elsewhere.example"),
    "HS256 aud": lambda f: f.shared(aud=f.issuer.url),
    "HS256 aud list": lambda f: f.shared(aud=["https://elsewhere.example", f.issuer.url]),
    "custom jwt.sign": lambda f: f.shared(aud=f.issuer.url, iss=f.issuer.url, id=f.user),
    "no iat": lambda f: f.shared(iat=...),
    "user_id": lambda f: f.shared(sub=..., user_id=f.user),
    "sub and the same user_id": lambda f: f.shared(user_id=f.user),
    "sub beside another userId, id and email": lambda f: f.shared(userId="1", id="2", email="3"),
    "times with fractions": lambda f: f.shared(exp=f.now + 900.5, iat=f.now - 0.5),
    "expired within the leeway": lambda f: f.shared(exp=f.now - 7),
    "nbf within the leeway": lambda f: f.shared(nbf=f.now + 7),
    "iat within the leeway": lambda f: f.shared(iat=f.now + 7),
    "exp in the year 9999": lambda f: f.shared(exp=253402300799),
    "names of any script": lambda f: f.shared(name='"\\\u202e\U0001f98a\0', image="x" * 4000),
    "16 KiB": lambda f: f.of_length(LIMIT),
    **{alg: lambda f, alg=alg: f.signed(alg) for alg in GENERATE},
    **{f"{alg} typ JWT": lambda f, alg=alg: f.signed(alg, {"typ": "JWT"}) for alg in GENERATE},
    "aud list": lambda f: f.signed(aud=["https://elsewhere.example", f.issuer.url]),
    "jku and jwk beside the right kid, ignored": lambda f: f.signed(
        header={"jku": f.stranger.url, "jwk": f.stranger.keys[0].jwk}
    ),
    "EdDSA user_id": lambda f: f.signed(sub=..., user_id=f.user),
}


@pytest.mark.parametrize("forge", ACCEPTED.values(), ids=ACCEPTED)
async def test_a_login_is_accepted(
    client: httpx.AsyncClient, forger: Forger, forge: Forge, app_log: pytest.LogCaptureFixture
) -> None:
    """FR-002, FR-003, FR-031, SC-002, US1-AS1."""
    headers = {"Authorization": f"Bearer {forge(forger)}"}
    response = await client.get(path_of(forger.user), headers=headers)
    assert (response.status_code, response.json()) == (200, []), app_log.messages
    assert forger.stranger.fetches == []


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "bEaReR"])
async def test_the_scheme_may_be_in_any_case(
    client: httpx.AsyncClient, forger: Forger, scheme: str
) -> None:
    headers = {"Authorization": f"{scheme} {forger.shared()}"}
    assert (await client.get(path_of(forger.user), headers=headers)).status_code == 200


# Attacks. Each would be accepted but for what its name says.

NOT_STRINGS: dict[str, object] = {
    "number": 5,
    "boolean": True,
    "null": None,
    "list": ["demo"],
    "object": {"demo": "demo"},
}
NOT_NUMBERS: dict[str, str] = {
    "date": '"2099-01-01T00:00:00Z"',
    "list": f"[{2**40}]",
    "object": "{}",
    "NaN": "NaN",
    "Infinity": "Infinity",
    "-Infinity": "-Infinity",
    "1e400": "1e400",
    "5000 digits": "9" * 5000,
}
CASINGS = ["".join(letters) for letters in itertools.product(*zip("none", "NONE", strict=True))]
OTHERS = {
    "RS384": "RS256",
    "RS512": "RS256",
    "PS384": "PS256",
    "PS512": "PS256",
    "ES256K": "ES256",
    "ES384": "ES256",
    "ESP256": "ES256",
    "Ed25519": "EdDSA",
    "eddsa": "EdDSA",
    "ED25519": "EdDSA",
}


def unsigned(f: Forger, alg: str, signature: str = "", **header: object) -> str:
    return f"{segment({'alg': alg, **header})}.{segment(f.issued())}.{signature}"


def resigned(f: Forger, signature: Callable[[bytes], bytes], by: str = "EdDSA") -> str:
    """A good token with its signature changed."""
    text, _, good = f.signed(by).rpartition(".")
    return f"{text}.{b64(signature(base64.urlsafe_b64decode(good + '==')))}"


def with_public_key(by: str, form: Callable[[Any], bytes]) -> Forge:
    """HS256 whose secret is what everybody can read in the JWKS."""

    def forge(f: Forger) -> str:
        key = f.keys[by]
        return f.raw({"alg": "HS256", "kid": key.kid}, f.issued(), form(key))

    return forge


def public(encoding: Encoding, form: PublicFormat) -> Callable[[Key], bytes]:
    return lambda key: key.private.public_key().public_bytes(encoding, form)


PEM = public(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

PUBLIC_KEYS: dict[str, tuple[str, Callable[[Any], bytes]]] = {
    "RSA PEM": ("RS256", PEM),
    "RSA PEM without the last line end": ("RS256", lambda key: PEM(key).rstrip()),
    "RSA PKCS1": ("RS256", public(Encoding.PEM, PublicFormat.PKCS1)),
    "RSA DER": ("RS256", public(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)),
    "RSA n": ("RS256", lambda key: key.jwk["n"].encode()),
    "PS256 PEM": ("PS256", PEM),
    "EC PEM": ("ES256", PEM),
    "EC point": ("ES256", public(Encoding.X962, PublicFormat.UncompressedPoint)),
    "Ed25519 PEM": ("EdDSA", PEM),
    "Ed25519 raw": ("EdDSA", public(Encoding.Raw, PublicFormat.Raw)),
    "Ed25519 x": ("EdDSA", lambda key: key.jwk["x"].encode()),
    "JWK": ("EdDSA", lambda key: json.dumps(key.jwk).encode()),
}


def stranger_key(f: Forger, algorithm: str) -> Key:
    return next(key for key in f.stranger.keys if key.algorithm == algorithm)


def der(raw: bytes) -> bytes:
    """A signature of two numbers as X.509 writes it, not as JWS does."""
    half = len(raw) // 2
    numbers = (int.from_bytes(part, "big") for part in (raw[:half], raw[half:]))
    return encode_dss_signature(*numbers)


REFUSED: dict[str, Forge] = {
    # RFC 8725 3.1, 3.2: the algorithm is ours to choose.
    **{f"alg {alg}": lambda f, alg=alg: unsigned(f, alg) for alg in CASINGS},
    "alg none with a signature": lambda f: unsigned(f, "none", hs256("x")),
    "alg none with a kid": lambda f: unsigned(f, "none", kid=f.keys["EdDSA"].kid),
    "alg none with a null signature": lambda f: unsigned(f, "none", "bnVsbA"),
    "alg none signed by the secret": lambda f: f.shared({"alg": "none"}),
    "alg missing": lambda f: f.shared({"alg": "HS256"}).replace(
        segment({"alg": "HS256"}), segment({"typ": "JWT"})
    ),
    "header without members": lambda f: f.raw({}, f.claims()),
    "alg empty": lambda f: f.shared({"alg": ""}),
    "alg in lower case": lambda f: f.shared({"alg": "hs256"}),
    "alg with a space": lambda f: f.shared({"alg": "HS256 "}),
    **{
        f"alg {kind}": lambda f, value=value: f.shared({"alg": value})
        for kind, value in {**NOT_STRINGS, "list": ["HS256"], "object": {"HS256": 1}}.items()
    },
    **{
        f"{alg} under the secret": lambda f, alg=alg: jwt.encode(f.claims(), SECRET, alg)
        for alg in ("HS384", "HS512")
    },
    **{
        f"{alg} with a listed key": lambda f, alg=alg, by=by: f.by(
            f.keys[by].private, {"alg": alg, "kid": f.keys[by].kid}, using=by
        )
        for alg, by in OTHERS.items()
    },
    **{
        f"{alg} by the key of {by}": lambda f, alg=alg, by=by: f.by(
            f.keys[by].private, {"alg": alg, "kid": f.keys[by].kid}
        )
        for alg, by in (("RS256", "PS256"), ("PS256", "RS256"))
    },
    **{
        f"HS256 with the public key: {form}": with_public_key(*key)
        for form, key in PUBLIC_KEYS.items()
    },
    "HS256 with an empty secret": lambda f: f.shared(secret=b""),
    "HS256 with a guessed secret": lambda f: f.shared(secret=b"secret"),
    "HS256 with Better Auth's public default": lambda f: f.shared(
        secret=b"better-auth-secret-12345678901234567890"
    ),
    "HS256 with the secret in other bytes": lambda f: f.shared(
        secret=base64.urlsafe_b64decode(SECRET.replace("_", "") + "===")
    ),
    "HS256 with the secret's hash": lambda f: f.shared(
        secret=hashlib.sha256(SECRET.encode()).digest()
    ),
    "dir": lambda f: f.shared({"alg": "dir", "enc": "A256GCM"}),
    "ECDH-ES": lambda f: f.shared({"alg": "ECDH-ES+A128KW", "epk": f.keys["ES256"].jwk}),
    # RFC 8725 3.3: signatures.
    "signature blank": lambda f: f.shared().rpartition(".")[0] + ".",
    "signature missing": lambda f: f.shared().rpartition(".")[0],
    "signature of another token": lambda f: (
        f.shared().rpartition(".")[0] + "." + f.shared(x=1).rpartition(".")[2]
    ),
    "signature of the same length": lambda f: f.shared().rpartition(".")[0] + "." + b64(bytes(32)),
    "signature of the payload alone": lambda f: (
        f.shared().rpartition(".")[0] + "." + hs256(segment(f.claims()))
    ),
    "signature cut short": lambda f: f.shared()[:-4],
    "signature with more behind it": lambda f: f.shared() + "AAAA",
    "payload exchanged": lambda f: ".".join(
        part if place != 1 else segment(f.claims(role="admin"))
        for place, part in enumerate(f.shared().split("."))
    ),
    "header exchanged": lambda f: (
        segment({"alg": "HS256", "typ": "JWT"}) + "." + f.shared().partition(".")[2]
    ),
    "another issuer's secret": lambda f: f.shared(
        secret=b"somebody-else-has-this-secret-0123456789"
    ),
    **{
        f"{by} with a bit changed": lambda f, by=by: resigned(
            f, lambda good: good[:-1] + bytes([good[-1] ^ 1]), by
        )
        for by in GENERATE
    },
    **{
        f"{by} of zeros": lambda f, by=by: resigned(f, lambda good: bytes(len(good)), by)
        for by in GENERATE
    },
    **{f"{by} blank": lambda f, by=by: resigned(f, lambda _: b"", by) for by in GENERATE},
    "ES256 in DER": lambda f: resigned(f, der, "ES256"),
    # RFC 8725 3.10: keys and places that the token itself names.
    **{
        f"{by} by somebody else's key, kid of ours": lambda f, by=by: f.by(
            stranger_key(f, by).private, {"alg": by, "kid": f.keys[by].kid}
        )
        for by in GENERATE
    },
    "jwk in the header": lambda f: f.by(
        f.stranger.keys[0].private,
        {"alg": "EdDSA", "kid": f.keys["EdDSA"].kid, "jwk": f.stranger.keys[0].jwk},
    ),
    "jwk in the header, no kid": lambda f: f.by(
        f.stranger.keys[0].private, {"alg": "EdDSA", "jwk": f.stranger.keys[0].jwk}
    ),
    "jwk of an own secret": lambda f: f.shared(
        {"jwk": {"kty": "oct", "k": b64(b"mine" * 8)}}, secret=b"mine" * 8
    ),
    **{
        name: lambda f, name=name: f.by(
            f.stranger.keys[0].private,
            {"alg": "EdDSA", "kid": f.keys["EdDSA"].kid, name: f"{f.stranger.url}/jwks"},
        )
        for name in ("jku", "x5u", "iss")
    },
    "iss of the attacker's server": lambda f: f.by(
        f.stranger.keys[0].private,
        {"alg": "EdDSA", "kid": f.keys["EdDSA"].kid},
        iss=f.stranger.url,
        aud=f.stranger.url,
    ),
    "x5c": lambda f: f.by(
        f.stranger.keys[3].private,
        {"alg": "RS256", "kid": f.keys["RS256"].kid, "x5c": [b64(PEM(f.stranger.keys[3]))]},
    ),
    "kid missing": lambda f: f.signed(header={"kid": ...}),
    **{
        f"kid {kind}": lambda f, value=value: f.signed(header={"kid": value})
        for kind, value in NOT_STRINGS.items()
    },
    "kid of another algorithm": lambda f: f.signed(header={"kid": f.keys["ES256"].kid}),
    "kid of a file, signed with its content": lambda f: f.shared(
        {"kid": "../../../../../../dev/null"}, secret=b""
    ),
    "kid of nobody": lambda f: f.signed(header={"kid": "nobody"}),
    "kid empty": lambda f: f.signed(header={"kid": ""}),
    "kid of SQL": lambda f: f.signed(header={"kid": "' or 1=1 --"}),
    "kid of another key set": lambda f: f.stranger.sign(
        f.user, f.stranger.keys[0], iss=f.issuer.url, aud=f.issuer.url
    ),
    # RFC 7515 4.1.11: what we do not understand.
    **{
        f"crit {kind}": lambda f, crit=crit: f.shared({"crit": crit, "b64": True})
        for kind, crit in {
            "empty": [],
            "exp": ["exp"],
            "b64": ["b64"],
            "unknown": ["http://example.com/x"],
            "null": None,
            "text": "b64",
        }.items()
    },
    "crit by a listed key": lambda f: f.signed(header={"crit": ["exp"]}),
    "b64 false": lambda f: f.shared({"b64": False, "crit": ["b64"]}),
    "zip": lambda f: f.raw(
        {"alg": "HS256", "zip": "DEF"}, zlib.compress(json.dumps(f.claims()).encode())
    ),
    # RFC 8725 3.11: tokens of another kind.
    **{
        f"typ {typ!r}": lambda f, typ=typ: f.shared({"typ": typ})
        for typ in ("", "at+jwt", "JWE", "secevent+jwt", None, 1, ["JWT"], {"JWT": 1})
    },
    "typ of Better Auth's cookie cache": lambda f: f.signed(
        header={"typ": "better-auth.session-cache+jwt"}
    ),
    "aud of Better Auth's cookie cache": lambda f: f.signed(aud="better-auth:session-cache"),
    # RFC 8725 3.12, rule 5: tokens that say no sub.
    "e-mail verification": lambda f: f.shared(sub=..., email="a@b.example", userId=f.user),
    "e-mail change": lambda f: f.shared(sub=..., email="a@b.example", updateTo="c@d.example"),
    "cookie cache": lambda f: f.shared(
        sub=..., session={"userId": f.user}, user={"id": f.user, "sub": f.user}
    ),
    "id alone": lambda f: f.shared(sub=..., id=f.user),
    "listed key, id alone": lambda f: f.signed(sub=...),
    # RFC 8725 3.8, 3.9: issuer, audience, subject.
    "sub missing": lambda f: f.shared(sub=...),
    "sub empty": lambda f: f.shared(sub=""),
    **{
        f"sub {kind}": lambda f, value=value: f.shared(sub=value)
        for kind, value in NOT_STRINGS.items()
    },
    "user_id empty": lambda f: f.shared(sub=..., user_id=""),
    **{
        f"user_id {kind}": lambda f, value=value: f.shared(sub=..., user_id=value)
        for kind, value in NOT_STRINGS.items()
    },
    "sub and another user_id": lambda f: f.shared(user_id="admin"),
    "sub and a null user_id": lambda f: f.shared(user_id=None),
    "user_id and an empty sub": lambda f: f.shared(sub="", user_id=f.user),
    "user_id and a null sub": lambda f: f.shared(sub=None, user_id=f.user),
    **{
        f"HS256 aud {kind}": lambda f, aud=aud: f.shared(aud=aud)
        for kind, aud in {
            "of another": "https://elsewhere.example",
            "empty": "",
            "empty list": [],
            "list of others": ["https://elsewhere.example"],
            **{kind: value for kind, value in NOT_STRINGS.items() if kind != "list"},
            "list of numbers": [1],
            "nested list": [["http://localhost:3000"]],
        }.items()
    },
    **{
        f"{change} {place}": lambda f, place=place, value=value: f.signed(
            **{place: value(f.issuer.url)}
        )
        for place in ("iss", "aud")
        for change, value in {
            "no": lambda _: ...,
            "wrong": lambda _: "https://elsewhere.example",
            "empty": lambda _: "",
            "null": lambda _: None,
            "number as": lambda _: 1,
            "object as": lambda url: {url: url},
            "slash behind": lambda url: f"{url}/",
            "path behind": lambda url: f"{url}/api/auth",
            "more behind": lambda url: f"{url}0",
            "less of": lambda url: url[:-1],
            "upper-case": lambda url: url.upper(),
        }.items()
    },
    "list as iss": lambda f: f.signed(iss=[f.issuer.url]),
    "aud list of others": lambda f: f.signed(aud=["https://elsewhere.example", "client-id"]),
    "aud of an OIDC client": lambda f: f.signed(aud="client-id"),
    # Rule 4: times.
    "exp missing": lambda f: f.shared(exp=...),
    "exp null": lambda f: f.shared(exp=None),
    "listed key, exp missing": lambda f: f.signed(exp=...),
    **{
        f"{name} {kind}": lambda f, name=name, value=value: f.text(**{name: value})
        for name in ("exp", "nbf", "iat")
        for kind, value in NOT_NUMBERS.items()
    },
    "nbf to come": lambda f: f.shared(nbf=f.now + 60),
    "iat to come": lambda f: f.shared(iat=f.now + 60),
    "listed key, nbf to come": lambda f: f.signed(nbf=f.now + 60),
    "listed key, iat to come": lambda f: f.signed(iat=f.now + 60),
    # RFC 8725 3.7 and JSON itself.
    "payload not UTF-8": lambda f: f.raw({"alg": "HS256"}, b'{"sub":"\xff","exp":9999999999}'),
    "header not UTF-8": lambda f: f.raw(b'{"alg":"HS256","x":"\xff"}', f.claims()),
    **{
        f"{place} {kind}": lambda f, place=place, content=content: f.raw(
            *((content, f.claims()) if place == "header" else ({"alg": "HS256"}, content))
        )
        for place in ("header", "payload")
        for kind, content in {
            "empty": b"",
            "null": b"null",
            "number": b"1",
            "list": b"[]",
            "list of pairs": b'[["alg","HS256"],["sub","demo"]]',
            "text": b'"demo"',
            "not JSON": b"{'alg':'HS256'}",
            "with text behind": b'{"alg":"HS256","sub":"demo","exp":9999999999} x',
            "cut short": b'{"alg":"HS256","sub":"demo","exp":9999999999',
            "a nesting bomb": b'{"alg":"HS256","x":' + b"[" * 5000,
            "gzip": b"\x1f\x8b\x08\x00",
        }.items()
    },
    "a nesting bomb that closes": lambda f: f.raw(
        {"alg": "HS256"}, b'{"sub":"demo","x":' + b"[" * 4000 + b"]" * 4000 + b"}", b"wrong"
    ),
    "a token in the token": lambda f: f.raw({"alg": "HS256", "cty": "JWT"}, f.shared().encode()),
    # The compact form.
    "more than 16 KiB": lambda f: f.of_length(LIMIT + 1),
    "much more than 16 KiB": lambda f: f.shared(name="x" * 40_000),
    "one segment": lambda f: f.shared().replace(".", ""),
    "two segments": lambda f: f.shared().rpartition(".")[0],
    "four segments": lambda f: f.shared() + ".x",
    "five segments (JWE)": lambda f: ".".join(
        [segment({"alg": "dir", "enc": "A256CBC-HS512"}), "", "iv", segment(f.claims()), "tag"]
    ),
    "five segments, signed": lambda f: f.shared() + ".x.y",
    "six segments": lambda f: f"{f.shared()}.{f.shared()}",
    "only dots": lambda _: "..",
    "empty header": lambda f: "." + f.shared().partition(".")[2],
    "empty payload": lambda f: ".".join([f.shared().partition(".")[0], "", "x"]),
    "opaque session token": lambda _: "VhQ1E3V7rHYz8rYv9gJnUqdVnvw5xR1y",
    "signed session token": lambda _: "VhQ1E3V7rHYz8.IIanpMK9SUtTYcjdPo6jH19TwpL50kFkBTFVQJhzlXQ=",
    "segments padded": lambda f: ".".join(part + "==" for part in f.shared().split(".")),
    "base64, not base64url": lambda f: ".".join(
        base64.b64encode(b'{"alg":"HS256","x":"\xc3\xbf\xc3\xbe>>>???"}').decode()
        if place == 0
        else part
        for place, part in enumerate(f.shared().split("."))
    ),
    "space inside": lambda f: f.shared().replace(".", ". "),
    "line end inside": lambda f: f.shared().replace(".", ".\n", 1),
    "NUL inside": lambda f: f.shared().replace(".", ".\0", 1),
    "no-break space behind": lambda f: f.shared() + "\xa0",
    "non-ASCII letter": lambda f: f.shared()[:-1] + "é",
    "dots of another script": lambda f: f.shared().replace(".", "。"),
    "percent-encoded": lambda f: f.shared().replace(".", "%2E"),
    "in quotes": lambda f: f'"{f.shared()}"',
    "with its name": lambda f: f"token={f.shared()}",
    "two in one header": lambda f: f"{f.shared()}, Bearer {f.shared()}",
    "scheme twice": lambda f: f"Bearer {f.shared()}",
    "JSON serialization": lambda f: json.dumps(
        dict(zip(("protected", "payload", "signature"), f.shared().split("."), strict=True))
    ),
}


EXPIRED: dict[str, Forge] = {
    "HS256": lambda f: f.shared(exp=f.now - 11),
    "EdDSA": lambda f: f.signed(exp=f.now - 11),
    "long ago": lambda f: f.shared(exp=1),
    "exp zero": lambda f: f.shared(exp=0),
    "exp negative": lambda f: f.shared(exp=-1),
    "exp negative, with a fraction": lambda f: f.shared(exp=-1.5),
}

Headers = list[tuple[bytes, bytes]]


def authorization(*values: str | bytes) -> Headers:
    """So many Authorization headers; text beyond ASCII is sent as UTF-8."""
    values = tuple(value.encode() if isinstance(value, str) else value for value in values)
    return [(b"Authorization", value) for value in values if isinstance(value, bytes)]


def in_header(forge: Forge) -> Callable[[Forger], Headers]:
    return lambda forger: authorization(f"Bearer {forge(forger)}")


# The key set is fetched once a second at the most, so behind "kid of nobody" each of these waits.
WAITING = {"kid empty", "kid of SQL", "kid of another key set", "kid of another algorithm"}


def refusals() -> Iterator[Any]:
    """Everything that is refused: code, and the headers that are sent."""
    for table, code in ((REFUSED, "INVALID_TOKEN"), (EXPIRED, "TOKEN_EXPIRED")):
        for name, forge in table.items():
            marks = [pytest.mark.slow] if name in WAITING else []
            yield pytest.param(code, in_header(forge), id=f"{code} {name}", marks=marks)
    several: dict[str, Callable[[Forger], Headers]] = {
        "two good ones": lambda f: authorization(f"Bearer {f.shared()}", f"Bearer {f.signed()}"),
        "the same twice": lambda f: authorization(*[f"Bearer {f.shared()}"] * 2),
        "good and empty": lambda f: authorization(f"Bearer {f.shared()}", ""),
        "Basic and good": lambda f: authorization("Basic ZGVtbzpkZW1v", f"Bearer {f.shared()}"),
        "bytes of no text": lambda _: authorization(b"Bearer \xff\xfe.\x80.\xc0"),
    }
    for name, headers in several.items():
        yield pytest.param("INVALID_TOKEN", headers, id=f"INVALID_TOKEN {name}")
    none: dict[str, Callable[[Forger], Headers]] = {
        "no header": lambda _: [],
        "empty": lambda _: authorization(""),
        "Bearer alone": lambda _: authorization("Bearer"),
        "Bearer and a space": lambda _: authorization("Bearer "),
        "Basic": lambda _: authorization("Basic ZGVtbzpkZW1v"),
        "Digest": lambda f: authorization(f"Digest {f.shared()}"),
        "token without scheme": lambda f: authorization(f.shared()),
        "scheme run together": lambda f: authorization(f"Bearer{f.shared()}"),
        "colon behind the scheme": lambda f: authorization(f"Bearer: {f.shared()}"),
        "in a cookie": lambda f: [
            (b"Cookie", f"token={f.shared()}; better-auth.session_data={f.shared()}".encode())
        ],
        "in X-Authorization": lambda f: [(b"X-Authorization", f"Bearer {f.shared()}".encode())],
    }
    for name, headers in none.items():
        code = "AUTHENTICATION_REQUIRED"
        yield pytest.param(code, headers, id=f"{code} {name}")


@pytest.mark.filterwarnings("ignore::jwt.warnings.InsecureKeyLengthWarning")
@pytest.mark.parametrize(("code", "headers"), list(refusals()))
async def test_anything_else_is_401(
    client: httpx.AsyncClient,
    forger: Forger,
    app_log: pytest.LogCaptureFixture,
    code: str,
    headers: Callable[[Forger], Headers],
) -> None:
    """FR-004, FR-027, SC-003, US1-AS3, RFC 8725 3.1 to 3.12; logged without the token."""
    sent = headers(forger)
    response = await client.get(path_of(forger.user), headers=sent)
    assert_error(response, code)
    assert response.headers["www-authenticate"] == CHALLENGES[code]
    (line,) = [message for message in app_log.messages if "user=" in message]
    assert app_log.records[-1].levelname == "WARNING"
    assert f"client=127.0.0.1 error={code}: " in line
    secrets = {part for _, value in sent for part in value.split(b".") if len(part) > 12}
    assert not any(secret.decode("latin-1") in line for secret in secrets), line
    assert forger.stranger.fetches == []


ODD: dict[str, Forge] = {
    **{
        f"{name} {kind}": lambda f, name=name, value=value: f.text(**{name: value})
        for name in ("exp", "nbf", "iat")
        for kind, value in {
            "text": f'"{2**40}"',
            "boolean": "true",
            "400 digits": "9" * 400,
            "400 negative digits": "-" + "9" * 400,
        }.items()
    },
    "sub twice": lambda f: f.text(sub=f'"admin","sub":"{f.user}"'),
    "sub twice, once escaped": lambda f: f.text(sub=f'"admin","s\\u0075b":"{f.user}"'),
    "exp twice": lambda f: f.text(exp='1,"exp":9999999999'),
    "aud twice": lambda f: f.text(aud=f'"x","aud":"{f.issuer.url}"'),
    "alg twice": lambda f: f.raw(b'{"alg":"none","alg":"HS256"}', f.claims()),
    "kid twice": lambda f: f.raw(b'{"alg":"HS256","kid":"a","kid":"b"}', f.claims()),
    "NaN in another claim": lambda f: f.text(x="NaN"),
    **{
        f"{encoding} {place}": lambda f, encoding=encoding, place=place: f.raw(
            *(
                json.dumps(value).encode(encoding if name == place else "utf-8")
                for name, value in (("header", {"alg": "HS256"}), ("payload", f.claims()))
            )
        )
        for place in ("header", "payload")
        for encoding in ("utf-8-sig", "utf-16", "utf-16-le", "utf-32")
    },
    "padded": lambda f: f.shared() + "=",
}


@pytest.mark.parametrize("forge", ODD.values(), ids=ODD)
async def test_an_odd_spelling_by_the_holder_of_the_secret_is_judged_by_pyjwt(
    client: httpx.AsyncClient, forger: Forger, forge: Forge
) -> None:
    """Rule 1: whatever that is, it is a judgement, and not for a second spelling of the token."""
    headers = {"Authorization": f"Bearer {forge(forger)}"}
    answers = [await client.get(path_of(forger.user), headers=headers) for _ in range(2)]
    assert answers[0].status_code in {200, 401, 403}, answers[0].text
    assert answers[1].text == answers[0].text
    header, payload, _ = forge(forger).split(".")
    headers = {"Authorization": f"Bearer {header}.{payload}.{b64(bytes(32))}"}
    assert_error(await client.get(path_of(forger.user), headers=headers), "INVALID_TOKEN")


async def test_a_token_in_the_query_is_no_token(client: httpx.AsyncClient, forger: Forger) -> None:
    """Nor in the body: RFC 6750 sections 2.2 and 2.3 are not for us."""
    query = {"access_token": forger.shared(), "token": forger.shared()}
    response = await client.get(path_of(forger.user), params=query)
    assert_error(response, "AUTHENTICATION_REQUIRED")


@pytest.mark.parametrize(
    "sub",
    ["\ud800", "a/b", "\0", "a\nb", " ", "..", "x" * 4000, "\U0001f98a", "\u202e", '"', "%2e", "-"],
    ids=ascii,
)
async def test_a_strange_user_sees_nobody_elses_tasks(
    client: httpx.AsyncClient, forger: Forger, capfd: pytest.CaptureFixture[str], sub: str
) -> None:
    """FR-005, and the log stays one line."""
    logging.getLogger("todo").handlers[0].flush()
    capfd.readouterr()  # what the test before has left
    headers = {"Authorization": f"Bearer {forger.shared(sub=sub)}"}
    response = await client.get(path_of(forger.user), headers=headers)
    assert_error(response, "FORBIDDEN")
    logging.getLogger("todo").handlers[0].flush()
    (line,) = capfd.readouterr().err.splitlines()
    assert " 403 " in line
    assert line.isprintable()


@pytest.mark.parametrize(
    ("path", "jwks"),
    [
        ("", "/api/auth/jwks"),
        ("/", "/api/auth/jwks"),
        ("/api/auth", "/api/auth/jwks"),
        ("/api/auth/", "/api/auth/jwks"),
        ("/app", "/app/jwks"),
        ("/app/", "/app/jwks"),
        ("/app/api/auth//", "/app/api/auth/jwks"),
    ],
)
async def test_the_issuer_is_the_origin_of_better_auth_url_and_the_keys_are_below_its_path(
    make_settings: Any, user: str, path: str, jwks: str
) -> None:
    """Rule 4: as Better Auth itself takes a base URL."""
    issuer = Issuer(Key("EdDSA"))
    async with client_of(make_settings(better_auth_url=issuer.url + path)) as client:
        response = await client.get(path_of(user), headers=issuer.bearer(user))
    assert (response.status_code, issuer.fetches) == (200, [jwks])
    issuer.away()


@pytest.mark.parametrize(
    "url",
    [
        "https://auth.example.com",
        "https://AUTH.Example.COM",
        "HTTPS://auth.example.com/",
        "https://auth.example.com:443",
        "https://auth.example.com/some/path",
        "https://auth.example.com:443/api/auth/",
    ],
)
async def test_case_path_and_default_port_do_not_change_the_origin(
    make_settings: Any, user: str, issuer: Issuer, url: str
) -> None:
    origin = "https://auth.example.com"
    async with client_of(
        make_settings(better_auth_url=url, jwks_url=f"{issuer.url}/keys")
    ) as client:
        for headers, status in (
            (issuer.bearer(user, iss=origin, aud=origin), 200),
            (issuer.bearer(user), 401),
        ):
            response = await client.get(path_of(user), headers=headers)
            assert response.status_code == status, headers


async def test_jwt_issuer_and_jwt_audience_replace_the_origin(
    make_settings: Any, user: str, issuer: Issuer, stranger: Issuer
) -> None:
    """And JWT_ISSUER binds HS256 tokens too."""
    ours = {"iss": "https://issuer.example", "aud": "todo-api"}
    settings = make_settings(
        better_auth_url=issuer.url, jwt_issuer=ours["iss"], jwt_audience=ours["aud"]
    )
    forger = Forger(user, issuer, stranger)
    cases: list[tuple[str, int]] = [
        (forger.signed(**ours), 200),
        (forger.signed(**ours | {"aud": ["x", "todo-api"]}), 200),
        (forger.signed(), 401),
        (forger.signed(aud="todo-api"), 401),
        (forger.signed(iss=ours["iss"]), 401),
        (forger.shared(**ours), 200),
        (forger.shared(iss=ours["iss"]), 200),
        (forger.shared(), 401),
        (forger.shared(iss=issuer.url), 401),
        (forger.shared(iss=ours["iss"], aud=issuer.url), 401),
    ]
    async with client_of(settings) as client:
        answers = [
            (await client.get(path_of(user), headers={"Authorization": f"Bearer {token}"}))
            for token, _ in cases
        ]
    assert [answer.status_code for answer in answers] == [status for _, status in cases]


LISTS = {
    "jwt_issuer": "https://app.example, https://admin.example",
    "jwt_audience": "todo-api ,https://app.example",
}


async def test_jwt_issuer_and_jwt_audience_may_be_lists(
    make_settings: Any, user: str, issuer: Issuer, stranger: Issuer
) -> None:
    """Better Auth of several hosts issues several; each of either list is right with each."""
    forger = Forger(user, issuer, stranger)
    issuers = ("https://app.example", "https://admin.example")
    audiences = ("todo-api", "https://app.example", ["elsewhere", "todo-api"])
    wrong: list[dict[str, object]] = [
        {"iss": "https://admin.example", "aud": "https://admin.example"},
        {"iss": "https://app.example, https://admin.example", "aud": "todo-api"},
        {"iss": list(issuers), "aud": "todo-api"},
        {"iss": "", "aud": "todo-api"},
        {"iss": ..., "aud": "todo-api"},
        {"iss": issuer.url, "aud": "todo-api"},
        {"iss": "https://app.example", "aud": issuer.url},
        {"iss": "https://app.example", "aud": LISTS["jwt_audience"]},
        {"iss": "https://app.example", "aud": ["elsewhere"]},
    ]
    right: list[dict[str, object]] = [
        {"iss": iss, "aud": aud} for iss, aud in itertools.product(issuers, audiences)
    ]
    async with client_of(make_settings(better_auth_url=issuer.url, **LISTS)) as client:
        for status, cases in ((200, right), (401, wrong)):
            for claims in cases:
                for token in (forger.signed(**claims), forger.shared(**claims)):
                    headers = {"Authorization": f"Bearer {token}"}
                    response = await client.get(path_of(user), headers=headers)
                    assert response.status_code == status, claims


# What a refusal tells the operator, and nobody else.

LONG = "x" * 5000
HOSTILE = "\n2026-01-01 INFO \x1b[31m user=admin \u202e\ud800"
Mismatch = tuple[Forge, str, str, str]  # the token, the value found, the one wanted, the variable
MISMATCHES: dict[str, Mismatch] = {
    "HS256 aud": (lambda f: f.shared(aud="my-app"), "my-app", "{origin}", "JWT_AUDIENCE"),
    "HS256 aud list": (
        lambda f: f.shared(aud=["my-app", "https://app.example"]),
        "my-app",
        "{origin}",
        "JWT_AUDIENCE",
    ),
    "HS256 aud empty": (lambda f: f.shared(aud=""), "''|missing", "{origin}", "JWT_AUDIENCE"),
    "HS256 aud of none": (
        lambda f: f.shared(aud=[]),
        r"\[\]|missing",
        "{origin}",
        "JWT_AUDIENCE",
    ),
    "HS256 aud number": (lambda f: f.shared(aud=4711), "4711", "{origin}", "JWT_AUDIENCE"),
    "HS256 aud in other case": (
        lambda f: f.shared(aud=f.issuer.url.upper()),
        "HTTP://127",
        "{origin}",
        "JWT_AUDIENCE",
    ),
    "aud": (lambda f: f.signed(aud="my-app"), "my-app", "{origin}", "JWT_AUDIENCE"),
    "aud list": (
        lambda f: f.signed("ES256", aud=["a-first", "a-second"]),
        "a-second",
        "{origin}",
        "JWT_AUDIENCE",
    ),
    "aud missing": (lambda f: f.signed(aud=...), "missing|no aud", "{origin}", "JWT_AUDIENCE"),
    "aud null": (lambda f: f.signed(aud=None), "missing|None|null", "{origin}", "JWT_AUDIENCE"),
    "iss": (
        lambda f: f.signed("RS256", iss="https://my-app.example"),
        "https://my-app.example",
        "{origin}",
        "JWT_ISSUER",
    ),
    "iss with a slash": (
        lambda f: f.signed(iss=f"{f.issuer.url}/"),
        "{origin}/",
        "{origin}(?!/)",
        "JWT_ISSUER",
    ),
    "iss missing": (lambda f: f.signed(iss=...), "missing|no iss", "{origin}", "JWT_ISSUER"),
    "iss number": (lambda f: f.signed(iss=4711), "4711", "{origin}", "JWT_ISSUER"),
    "aud long": (lambda f: f.signed(aud=LONG), "x{30}", "{origin}", "JWT_AUDIENCE"),
    "aud long list": (lambda f: f.signed(aud=["x"] * 2000), "x", "{origin}", "JWT_AUDIENCE"),
    "aud deep": (
        lambda f: f.shared(aud=json.loads("[" * 90 + "]" * 90)),
        r"\[\[",
        "{origin}",
        "JWT_AUDIENCE",
    ),
    "iss long": (lambda f: f.signed(iss=LONG), "x{30}", "{origin}", "JWT_ISSUER"),
    "aud hostile": (lambda f: f.shared(aud=HOSTILE), "admin", "{origin}", "JWT_AUDIENCE"),
    "iss hostile": (lambda f: f.signed(iss=HOSTILE), "admin", "{origin}", "JWT_ISSUER"),
}


def refused(server: Server, user: str, token: str) -> str:
    """The reason of the refusal in the server's log."""
    headers = {"Authorization": f"Bearer {token}", "X-Request-ID": new_user()}
    assert_error(get(server.url + path_of(user), headers=headers), "INVALID_TOKEN")
    [line] = server.log_lines(f" request={headers['X-Request-ID']} ")
    assert " WARNING " in line
    assert line.isprintable()
    assert not any(part in line for part in token.split("."))
    return line.partition(" error=INVALID_TOKEN: ")[2]


@pytest.fixture(scope="module")
def server(database_url: str, issuer: Issuer) -> Iterator[Server]:
    with servers(database_url) as serve:
        yield serve({"BETTER_AUTH_URL": issuer.url})


@pytest.mark.parametrize(
    ("forge", "found", "wanted", "variable"), MISMATCHES.values(), ids=MISMATCHES
)
def test_a_refusal_for_its_aud_or_iss_says_what_to_set(
    server: Server, forger: Forger, forge: Forge, found: str, wanted: str, variable: str
) -> None:
    """Frontends choose values of their own. The caller is told nothing of it."""
    reason = refused(server, forger.user, forge(forger))
    origin = re.escape(forger.issuer.url)
    for fact in (found, wanted):
        assert re.search(fact.replace("{origin}", origin), reason), (fact, reason)
    assert {"JWT_AUDIENCE", "JWT_ISSUER"} & set(re.findall(r"\w+", reason)) == {variable}
    assert len(reason) < 400
    assert not re.search("x{121}", reason)


@pytest.mark.slow
def test_a_refusal_says_what_the_variables_want(
    serve: Serve, forger: Forger, issuer: Issuer
) -> None:
    """With JWT_ISSUER, of HS256 tokens too."""
    ours = {"iss": "https://issuer.example", "aud": "todo-api"}
    names = {"JWT_ISSUER": ours["iss"], "JWT_AUDIENCE": ours["aud"]}
    server = serve({"BETTER_AUTH_URL": issuer.url, **names})
    cases = {
        forger.shared(**ours | {"iss": "my-app"}): ("my-app", ours["iss"], "JWT_ISSUER"),
        forger.shared(aud="todo-api"): ("missing", ours["iss"], "JWT_ISSUER"),
        forger.shared(**ours | {"aud": "my-app"}): ("my-app", "todo-api", "JWT_AUDIENCE"),
        forger.signed(**ours | {"aud": "my-app"}): ("my-app", "todo-api", "JWT_AUDIENCE"),
    }
    for token, facts in cases.items():
        reason = refused(server, forger.user, token)
        assert [fact for fact in facts if fact not in reason] == [], reason


@pytest.mark.slow
def test_a_refusal_says_every_value_of_a_list(serve: Serve, forger: Forger, issuer: Issuer) -> None:
    names = {name.upper(): value for name, value in LISTS.items()}
    server = serve({"BETTER_AUTH_URL": issuer.url, **names})
    reason = refused(server, forger.user, forger.signed(iss="my-app"))
    assert "'my-app', not https://app.example or https://admin.example: " in reason
    reason = refused(server, forger.user, forger.signed(iss="https://app.example", aud="my-app"))
    assert "'my-app', not todo-api or https://app.example: " in reason


def test_an_empty_issuer_is_mended_on_the_other_side(server: Server, forger: Forger) -> None:
    """Better Auth without a base URL signs one, and JWT_ISSUER cannot be set to that."""
    reason = refused(server, forger.user, forger.signed(iss=""))
    assert "Better Auth has no base URL: set it there" in reason
    assert "JWT_ISSUER" not in reason


NO_JWT: dict[str, Forge] = {
    "session token": lambda _: "VhQ1E3V7rHYz8rYv9gJnUqdVnvw5xR1y",
    "signed session token": lambda _: "VhQ1E3V7rHYz8.IIanpMK9SUtTYcjdPo6jH19TwpL50kFkBTFVQJhzlXQ=",
    "encrypted session": lambda f: ".".join(
        [
            segment({"alg": "dir", "enc": "A256CBC-HS512"}),
            "a-key",
            "an-iv",
            segment(f.claims()),
            "a-tag",
        ]
    ),
    "undefined": lambda _: "undefined",
    "more than 16 KiB": lambda f: f.of_length(LIMIT + 1),
}


@pytest.mark.parametrize("forge", NO_JWT.values(), ids=NO_JWT)
def test_a_refusal_of_a_session_token_says_where_the_jwt_is(
    server: Server, forger: Forger, forge: Forge
) -> None:
    reason = refused(server, forger.user, forge(forger))
    assert reason.startswith("not a signed JWT")
    assert "GET /api/auth/token" in reason


EARLY: dict[str, Callable[[Forger, float], str]] = {
    "HS256 nbf": lambda f, early: f.shared(nbf=time.time() + early),
    "HS256 iat": lambda f, early: f.shared(iat=time.time() + early),
    "EdDSA nbf": lambda f, early: f.signed(nbf=int(time.time() + early)),
    "EdDSA iat": lambda f, early: f.signed(iat=int(time.time() + early), nbf=1),
    "both, of which one is right": lambda f, early: f.shared(
        iat=time.time() - 9, nbf=time.time() + early
    ),
}


@pytest.mark.parametrize("early", [60, 7200])
@pytest.mark.parametrize("forge", EARLY.values(), ids=EARLY)
def test_a_refusal_of_a_token_to_come_says_by_how_many_seconds(
    server: Server, forger: Forger, forge: Callable[[Forger, float], str], early: int
) -> None:
    """A clock is off: that of a VM, say."""
    reason = refused(server, forger.user, forge(forger, early))
    found = re.search(r"by (\d+) s: is a clock off\?", reason)
    assert found, reason
    assert early - 3 <= int(found[1]) <= early


@pytest.mark.parametrize("ago", [11, 3600])
def test_a_refusal_of_an_expired_token_says_for_how_many_seconds(
    server: Server, forger: Forger, ago: int
) -> None:
    for forge in (forger.shared, forger.signed):
        token = forge(exp=int(time.time()) - ago)
        headers = {"Authorization": f"Bearer {token}", "X-Request-ID": new_user()}
        response = get(server.url + path_of(forger.user), headers=headers)
        assert_error(response, "TOKEN_EXPIRED")
        [line] = server.log_lines(f" request={headers['X-Request-ID']} ")
        found = re.search(r" error=TOKEN_EXPIRED: expired (\d+) s ago$", line)
        assert found, line
        assert ago <= int(found[1]) <= ago + 3


def test_a_refusal_of_an_untimely_token_of_nobody_says_nothing_of_its_times(
    server: Server, forger: Forger
) -> None:
    token = forger.shared(secret=b"guessed" * 8, exp=1, nbf=time.time() + 4711)
    reason = refused(server, forger.user, token)
    assert not re.search(r"\d", reason)


def test_a_refusal_for_its_signature_says_nothing_of_its_claims(
    server: Server, forger: Forger
) -> None:
    """Anybody can write those."""
    token = forger.shared(secret=b"guessed" * 8, aud="my-app", iss="my-app")
    assert "my-app" not in refused(server, forger.user, token)


async def test_the_secret_is_its_utf_8_bytes(make_settings: Any, user: str) -> None:
    secret = "zwölf Boxkämpfer jagen Viktor — über den Deich"
    token = jwt.encode({"sub": user, "exp": time.time() + 60}, secret.encode(), "HS256")
    async with client_of(make_settings(better_auth_secret=secret)) as client:
        headers = {"Authorization": f"Bearer {token}"}
        assert (await client.get(path_of(user), headers=headers)).status_code == 200


# The memory of verified tokens.


@pytest.mark.slow
async def test_a_remembered_token_is_refused_once_it_has_expired(
    client: httpx.AsyncClient, forger: Forger
) -> None:
    """Edge case: expired token. Both kinds, seen a moment before."""
    expiring = [forger.shared(exp=forger.now - 8), forger.signed(exp=forger.now - 8)]
    for token in expiring:
        headers = {"Authorization": f"Bearer {token}"}
        assert (await client.get(path_of(forger.user), headers=headers)).status_code == 200
    time.sleep(3)
    for token in expiring:
        headers = {"Authorization": f"Bearer {token}"}
        assert_error(await client.get(path_of(forger.user), headers=headers), "TOKEN_EXPIRED")


async def test_a_remembered_token_helps_no_other(client: httpx.AsyncClient, forger: Forger) -> None:
    good = forger.shared()
    for token, status in ((good, 200), (good[:-1], 401), (good + "A", 401), (good, 200)):
        headers = {"Authorization": f"Bearer {token}"}
        response = await client.get(path_of(forger.user), headers=headers)
        assert response.status_code == status


@pytest.mark.slow
async def test_the_memory_is_bounded(make_settings: Any) -> None:
    import todo

    tokens = todo.TokenVerifier(make_settings())
    forger = Forger(new_user(), *[SimpleNamespace(url="", keys=[])] * 2)  # type: ignore[arg-type]
    last = b""
    for number in range(todo.VERIFIED_MAX + 50):
        last = f"Bearer {forger.shared(jti=str(number))}".encode()
        assert await tokens.authenticate([last]) == forger.user
    assert len(tokens.verified) == todo.VERIFIED_MAX
    assert await tokens.authenticate([last]) == forger.user
