"""A guard of the server: it fetches nothing from elsewhere for anyone."""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias
from urllib.parse import unquote

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]


class NoForeignFiles:
    """ASGI middleware that refuses gradio's address for files of other servers, which it would fetch for anyone."""

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        path = unquote(str(scope.get("path", ""))).lower()
        if scope["type"] != "http" or not any(f"{kind}=http" in path for kind in ("file", "proxy")):
            await self.app(scope, receive, send)
            return
        headers = [(b"content-type", b"text/plain")]
        await send({"type": "http.response.start", "status": 403, "headers": headers})
        await send({"type": "http.response.body", "body": b"this page fetches nothing from elsewhere"})
