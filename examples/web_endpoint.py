"""A web endpoint that awaits a batcher: one process, one loop, and many requests in flight.

Run it with any ASGI server, and with the batcher's address in the environment:

    pip install starlette uvicorn
    BATCHER=localhost:50051 uvicorn web_endpoint:app
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from grpc_batcher import AsyncMukoeBatcherClient, RequestError

import grpc
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

HTTP_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[dict[str, AsyncMukoeBatcherClient]]:
    async with AsyncMukoeBatcherClient(os.environ["BATCHER"]) as client:
        yield {"client": client}


async def infer(request: Request) -> Response:
    """Answer the body of a POST. A request takes 2 s at most, even if its visitor has gone."""
    try:
        answer, step = await request.state.client.send_request(await request.body(), timeout_s=2.0)
    except RequestError as error:
        return JSONResponse({"error": error.details()}, HTTP_STATUS.get(error.code(), 500))
    return Response(answer["result"], headers={"X-Step": str(step)})


app = Starlette(routes=[Route("/infer", infer, methods=["POST"])], lifespan=lifespan)
