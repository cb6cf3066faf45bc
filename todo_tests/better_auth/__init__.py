"""Issuers of tokens: a real Better Auth in Node, and a small JWKS server that can misbehave."""

import json
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import get_default_algorithms

from todo_tests.support import SECRET, node_packages

HERE = Path(__file__).parent


# The real thing


class BetterAuth:
    """A running Better Auth server at `url`."""

    def __init__(self, control: httpx.Client, url: str, base: str) -> None:
        self.control = control
        self.url = url
        self.base = url + base

    def command(self, name: str, **arguments: object) -> Any:
        """One of the commands of server.mjs."""
        answer = self.control.post(name, json={"url": self.url, **arguments})
        return answer.raise_for_status().json()

    def sign_up(self) -> "Session":
        """A new user, signed in."""
        return Session(self)

    @property
    def jwks_requests(self) -> int:
        return int(self.command("state")["jwksRequests"])


class Session:
    """A signed-in user of a Better Auth server, with the session cookie."""

    def __init__(self, auth: BetterAuth) -> None:
        self.client = httpx.Client(headers={"Origin": auth.url})
        self.base = auth.base
        account = {"email": f"{uuid.uuid4().hex}@example.com", "password": "correct horse"}
        sign_up = self.client.post(f"{self.base}/sign-up/email", json={"name": "Ann", **account})
        sign_up.raise_for_status()
        self.user = str(sign_up.json()["user"]["id"])
        self.bearer = sign_up.headers["set-auth-token"]
        self.session_token = sign_up.json()["token"]

    def token(self) -> str:
        """A token of the jwt plugin."""
        return str(self.client.get(f"{self.base}/token").raise_for_status().json()["token"])


StartBetterAuth = Callable[..., BetterAuth]


@contextmanager
def better_auth_servers() -> Iterator[StartBetterAuth]:
    """A factory of Better Auth servers, each with options of its own; see server.mjs."""
    node_packages(HERE)
    pipe = subprocess.PIPE
    with subprocess.Popen(["node", "server.mjs"], cwd=HERE, stdin=pipe, stdout=pipe) as process:
        assert process.stdout
        port = int(process.stdout.readline())
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as control:

            def start(
                options: dict[str, Any] | None = None,
                *,
                secret: str = SECRET,
                path: str = "",
                **rest: object,
            ) -> BetterAuth:
                """`path` is that of its base URL; with one, it ignores the option basePath."""
                options = {"secret": secret, **(options or {})}
                answer = control.post("start", json={"options": options, "path": path, **rest})
                url = answer.raise_for_status().json()["url"]
                base = path.rstrip("/") or options.get("basePath", "/api/auth")
                return BetterAuth(control, url, base)

            try:
                yield start
            finally:
                process.kill()


# The one that can misbehave

GENERATE: dict[str, Callable[[], Any]] = {
    "EdDSA": ed25519.Ed25519PrivateKey.generate,
    "ES256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "ES512": lambda: ec.generate_private_key(ec.SECP521R1()),
    "RS256": lambda: rsa.generate_private_key(65537, 2048),
    "PS256": lambda: rsa.generate_private_key(65537, 2048),
}


class Key:
    """A key pair of the issuer."""

    def __init__(self, algorithm: str, kid: str | None = None) -> None:
        self.algorithm = algorithm
        self.kid = kid or uuid.uuid4().hex
        self.private = GENERATE[algorithm]()
        public = self.private.public_key()
        jwk = get_default_algorithms()[algorithm].to_jwk(public, as_dict=True)
        jwk.pop("key_ops", None)
        self.jwk = {"alg": algorithm, **jwk, "kid": self.kid}  # as Better Auth publishes it


class Issuer:
    """An HTTP server with a JWKS that counts its fetches and answers as it is told."""

    def __init__(self, *keys: Key) -> None:
        self.keys = list(keys)
        self.fetches: list[str] = []  # the paths that were asked for
        self.answer: Callable[[BaseHTTPRequestHandler], None] | None = None
        self.port = 0
        self.back()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def jwks(self) -> bytes:
        return json.dumps({"keys": [key.jwk for key in self.keys]}).encode()

    def back(self) -> None:
        """Listen, on the same port as before."""
        issuer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                issuer.fetches.append(self.path)
                if issuer.answer is None:
                    respond(self, issuer.jwks)
                else:
                    issuer.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        class Listener(ThreadingHTTPServer):
            request_queue_size = 128

            def handle_error(self, *_: object) -> None:
                """The client has a limit and went away."""

        self.server = Listener(("127.0.0.1", self.port), Handler)
        self.port = self.server.server_port
        Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def away(self) -> None:
        """Stop listening: connections are refused."""
        self.server.shutdown()
        self.server.server_close()

    def sign(self, user: str, key: Key | None = None, **claims: object) -> str:
        """A token as Better Auth's jwt plugin makes it; a claim set to None is left out."""
        key = key or self.keys[-1]
        now = int(time.time())
        payload: dict[str, object] = {"iat": now, "name": "Ann", "id": user, "sub": user}
        payload |= {"exp": now + 900, "iss": self.url, "aud": self.url} | claims
        payload = {name: value for name, value in payload.items() if value is not None}
        headers = {"kid": key.kid, "typ": None}
        return jwt.encode(payload, key.private, key.algorithm, headers)

    def bearer(self, user: str, key: Key | None = None, **claims: object) -> dict[str, str]:
        """The Authorization header with such a token."""
        return {"Authorization": f"Bearer {self.sign(user, key, **claims)}"}


def respond(
    to: BaseHTTPRequestHandler, body: bytes = b"", status: int = 200, **headers: str
) -> None:
    """Answer a request of the issuer's."""
    to.send_response(status)
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}
    for name, value in headers.items():
        to.send_header(name.replace("_", "-"), value)
    to.end_headers()
    to.wfile.write(body)
