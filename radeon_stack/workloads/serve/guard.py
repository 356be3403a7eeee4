"""What stands before either server: nobody is answered without the key, on any path but one that says nothing."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from radeon_stack.contracts.serve import HEALTH

KEY_FILE_VARIABLE = "RADEON_STACK_KEY_FILE"
REFUSED = {"message": "Incorrect API key provided", "type": "invalid_request_error", "code": "invalid_api_key"}
POLICY_VIOLATION = 1008  # of a websocket: RFC 6455, 7.4.1
Told = MutableMapping[str, Any]
App = Callable[[Told, Callable[[], Awaitable[Told]], Callable[[Told], Awaitable[None]]], Awaitable[None]]


class Guard:
    """ASGI middleware. Browsers' preflight requests have no key, so that no web page can ask anything either."""

    def __init__(self, app: App) -> None:
        self._app = app
        key = Path(os.environ[KEY_FILE_VARIABLE]).read_text(encoding="ascii").strip()
        if not key:
            raise ValueError(f"{os.environ[KEY_FILE_VARIABLE]} is empty")
        self._wanted = f"Bearer {key}".encode()

    async def __call__(
        self, scope: Told, receive: Callable[[], Awaitable[Told]], send: Callable[[Told], Awaitable[None]]
    ) -> None:
        if scope["type"] == "lifespan" or self._may(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": POLICY_VIOLATION})
        else:
            await send({"type": "http.response.start", "status": 401, "headers": _HEADERS})
            await send({"type": "http.response.body", "body": json.dumps({"error": REFUSED}).encode()})

    def _may(self, scope: Told) -> bool:
        if scope["type"] == "http" and scope["method"] == "GET" and scope["path"] == HEALTH:
            return True
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(given) == 1 and secrets.compare_digest(given[0], self._wanted)


_HEADERS = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
