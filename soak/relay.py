"""A relay in front of a server. It breaks connections at random moments, with whatever is in flight on them."""

from __future__ import annotations

import asyncio
import random
import threading
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from child import Faults, obey

MAX_LIFE_S = 3.0
_CHUNK_BYTES = 1 << 16


class Relay:
    def __init__(self, port: int, seed: str) -> None:
        self._port = port
        self._chance = random.Random(seed)
        self.broken = 0

    async def serve(self, client_in: asyncio.StreamReader, client_out: asyncio.StreamWriter) -> None:
        """One connection."""
        server_in, server_out = await asyncio.open_connection("127.0.0.1", self._port)
        both = [asyncio.create_task(_pass_on(*ends)) for ends in ((client_in, server_out), (server_in, client_out))]
        _, unfinished = await asyncio.wait(
            both, timeout=self._chance.random() * MAX_LIFE_S, return_when=asyncio.FIRST_COMPLETED
        )
        self.broken += len(unfinished) == len(both)
        for each in unfinished:
            each.cancel()
        for writer in (client_out, server_out):
            writer.transport.abort()


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while data := await reader.read(_CHUNK_BYTES):
            writer.write(data)
            await writer.drain()


def relay(pipe: Connection, port: int, seed: str) -> None:
    """The process. It relays to a port of this machine until it is told to stop."""
    faults = Faults()
    between = Relay(port, seed)
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(between.serve, "127.0.0.1", 0))
    threading.Thread(target=loop.run_forever, daemon=True).start()

    def sample(_grace_s: float = 0) -> dict[str, Any]:
        return {"broken": between.broken}

    pipe.send({"port": server.sockets[0].getsockname()[1]})
    obey(pipe, faults, {"sample": sample, "stop": sample})
