"""The example of a web endpoint that awaits a batcher."""

from __future__ import annotations

import asyncio
import importlib.util
from pathlib import Path
from typing import Any

import pytest
from serving import address_of, answer, serving

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "web_endpoint.py"


@pytest.fixture
def endpoint() -> Any:
    pytest.importorskip("starlette")
    spec = importlib.util.spec_from_file_location("web_endpoint", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ask(endpoint: Any, bodies: list[bytes]) -> list[Any]:
    """Post to the endpoint, all at once, within the application's life."""
    httpx = pytest.importorskip("httpx")

    async def post_all() -> list[Any]:
        async with endpoint.lifespan(endpoint.app) as state:
            transport = httpx.ASGITransport(_with_state(endpoint.app, state))
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as visitor:
                return await asyncio.gather(*(visitor.post("/infer", content=body) for body in bodies))

    return asyncio.run(post_all())


def _with_state(app: Any, state: dict[str, Any]) -> Any:
    """What an ASGI server does with what the lifespan yields."""

    async def serve(scope: dict[str, Any], receive: Any, send: Any) -> None:
        await app({**scope, "state": state}, receive, send)

    return serve


def test_many_visitors_are_answered_from_few_batches(endpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(batch_size=32, batch_timeout_s=1000.0) as batcher:
        monkeypatch.setenv("BATCHER", address_of(batcher))
        responses = ask(endpoint, [b"%d" % number for number in range(64)])
        assert [response.content for response in responses] == [
            answer(b"%d" % number)[0]["result"] for number in range(64)
        ]
        assert {response.headers["x-step"] for response in responses} == {"0"}
        assert batcher.metrics().batches["full"] == 2


def test_a_batcher_that_is_away_is_an_error_of_the_gateway(endpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHER", "127.0.0.1:1")
    (response,) = ask(endpoint, [b"x"])
    assert response.status_code == 503
    assert response.json()["error"]
