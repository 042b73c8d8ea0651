"""Requests to a server whose answers stream.

What arrives is kept with its time and read after the run: the client must not be what is slow, nor take part in the contest for
cores more than it has to. Scripts of this folder use it, and those of the bundle for machines with a GPU.
"""

import asyncio
import dataclasses
import json
import os
import pathlib
import time
from typing import Iterator

HOST = "127.0.0.1"


@dataclasses.dataclass
class Answer:
    """When its request was sent, and what arrived, and when, by `time.perf_counter`."""

    began: float = 0.0
    chunks: "list[tuple[float, bytes]]" = dataclasses.field(default_factory=list)

    def events(self) -> "Iterator[tuple[float, bytes]]":
        """The events of the stream as JSON that is not read yet, each with the time when it was complete."""
        line = b""
        for at, chunk in self.chunks:
            *lines, line = (line + chunk).split(b"\n")
            yield from ((at, text[6:]) for text in lines if text.startswith(b"data: {"))

    def beginning(self) -> bytes:
        """What arrived first: the head, if anything did."""
        return self.chunks[0][1] if self.chunks else b"nothing"


class Client(asyncio.Protocol):
    """One request, on a connection of its own."""

    def __init__(self, content: bytes):
        self.content, self.answer = content, Answer()
        self.ended = asyncio.get_running_loop().create_future()

    def connection_made(self, transport) -> None:
        self.answer.began = time.perf_counter()
        transport.write(self.content)

    def data_received(self, data: bytes) -> None:
        self.answer.chunks.append((time.perf_counter(), data))

    def connection_lost(self, error) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


def request(port: int, path: str, body: dict) -> bytes:
    """A request as it is sent; its answer ends the connection."""
    text = json.dumps(body)
    return (f"POST {path} HTTP/1.1\r\nHost: {HOST}:{port}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(text)}\r\nConnection: close\r\n\r\n{text}").encode()


async def fetch(port: int, content: bytes, seconds_max: float) -> Answer:
    """Sends a request, and gives what came until the connection ended, or until it took too long."""
    transport, client = await asyncio.get_running_loop().create_connection(lambda: Client(content), HOST, port)
    await asyncio.wait([client.ended], timeout=seconds_max)
    transport.abort()
    return client.answer


def own_s() -> float:
    """Seconds of processor time of this process."""
    times = os.times()
    return times.user + times.system


def process_s(pid: int) -> float:
    """Seconds of processor time of a process; 0 where the system does not tell."""
    stat = pathlib.Path(f"/proc/{pid}/stat")
    if not stat.is_file():
        return 0.0
    fields = stat.read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
