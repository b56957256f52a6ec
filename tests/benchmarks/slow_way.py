"""A TCP relay that delays every request and bounds every connection's rate.

    python -m tests.benchmarks.slow_way PORT SERVER_PORT

Owns nothing else; runs until it is killed.
"""

from __future__ import annotations

import asyncio
import sys
import time
from contextlib import suppress

# What a store in the same region takes to answer, and what it gives one connection, roughly.
_DELAY_S = 0.03
_CONNECTION_BYTES_PER_S = 15_000_000
_SLICE_BYTES = 256 << 10


async def run(port: int, server_port: int) -> None:
    """Relay connections for ever."""

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", server_port, limit=4 * _SLICE_BYTES)
            await asyncio.gather(_requests(reader, far_writer), _answers(far_reader, writer))

    server = await asyncio.start_server(relay, "127.0.0.1", port, limit=4 * _SLICE_BYTES)
    await server.serve_forever()


async def _requests(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(_SLICE_BYTES):
        await asyncio.sleep(_DELAY_S)
        writer.write(data)
        await writer.drain()
    writer.close()


async def _answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    due = time.monotonic()
    while data := await reader.read(_SLICE_BYTES):
        writer.write(data)
        await writer.drain()
        due = max(due, time.monotonic()) + len(data) / _CONNECTION_BYTES_PER_S
        await asyncio.sleep(max(0.0, due - time.monotonic()))
    writer.close()


if __name__ == "__main__":
    asyncio.run(run(int(sys.argv[1]), int(sys.argv[2])))
