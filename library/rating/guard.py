"""Who may speak to the page's server: this machine's browser on this page, or whoever has the token."""

from __future__ import annotations

import hmac
from collections.abc import Mapping, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlsplit

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from library.errors import UserError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
COOKIE = "leco_token"
LARGEST_BODY = 5 * 2**20
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; frame-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
)
HEADERS: Mapping[bytes, bytes] = {
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",  # the first address may hold the token
    b"cross-origin-opener-policy": b"same-origin",
    b"cross-origin-resource-policy": b"same-origin",
}


class Guard:
    """Answers 403 to requests that do not come from the page, and 413 to those that are too long.

    A name that another site made point to this machine (DNS rebinding) is no host of ours; a form or a script of another site (CSRF) has
    another origin, and may not send JSON. Where others than this machine may connect, everything needs the token: from the address once,
    then from a cookie.

    Args:
        hosts: names by which the server may be addressed; others get nothing.
        token: asked for; None where only this machine can connect.
    """

    def __init__(self, app: ASGIApp, hosts: tuple[str, ...], token: str | None) -> None:
        self._app, self._hosts, self._token = app, hosts, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        reason = self._refusal(scope, headers)
        if reason is not None:
            await PlainTextResponse(reason, status_code=403)(scope, receive, send)
            return
        if not headers.get("content-length", "0").isdigit() or int(headers.get("content-length", "0")) > LARGEST_BODY:
            await PlainTextResponse(f"more than {LARGEST_BODY >> 20} MB are not taken", status_code=413)(scope, receive, send)
            return
        new_cookie = self._token is not None and self._in_address(scope)
        read = 0

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > LARGEST_BODY:
                raise UserError(f"more than {LARGEST_BODY >> 20} MB are not taken")
            return message

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                add_headers(message, new_cookie and self._token)
            await send(message)

        await self._app(scope, limited, guarded)

    def _refusal(self, scope: Scope, headers: Mapping[str, str]) -> str | None:
        if host_name(headers.get("host", "")) not in self._hosts:
            return "this server is not known by that name; open it by the address that it printed"
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != headers.get("host"):
            return "another site may not use this page"
        if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            opened = scope["method"] == "GET" and headers.get("sec-fetch-mode") == "navigate"
            if not opened:
                return "another site may not use this page"
        if scope["method"] not in ("GET", "HEAD") and headers.get("content-type", "").partition(";")[0] not in (
            "application/json",
            "text/csv",
        ):
            return "requests are JSON, and tables are CSV"
        if self._token is not None and not (self._in_address(scope) or same(_cookie(headers), self._token)):
            return "open the page by the whole address that the program printed, with its token"
        return None

    def _in_address(self, scope: Scope) -> bool:
        given = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("token", [""])[0]
        return self._token is not None and same(given, self._token)


def add_headers(message: MutableMapping[str, Any], token: str | None | bool) -> None:
    present = {name.lower() for name, _ in message["headers"]}
    message["headers"] = [*message["headers"], *((name, value) for name, value in HEADERS.items() if name not in present)]
    if b"content-security-policy" not in present:
        message["headers"].append((b"content-security-policy", PAGE_POLICY.encode()))
    if token:
        message["headers"].append((b"set-cookie", f"{COOKIE}={token}; HttpOnly; SameSite=Strict; Path=/".encode()))


def host_name(host: str) -> str:
    """The name in a Host header, without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def same(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "replace"), token.encode())


def _cookie(headers: Mapping[str, str]) -> str:
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return ""
    return found.value if found is not None else ""
