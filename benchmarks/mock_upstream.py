"""Run the mock upstream alone: python -m benchmarks.mock_upstream PORT"""

from __future__ import annotations

import asyncio
import sys

import uvloop

from benchmarks.http_tools import MockUpstream


async def main(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(MockUpstream, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1])))
