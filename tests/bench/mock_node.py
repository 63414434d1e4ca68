"""A node that costs next to nothing: pre-built answers, a chunk for every running stream every 20 ms.

Like an engine, it makes one step for all its requests at once, and a whole answer is not there before a step either: a
proxy that asks for one, and a proxy that asks for a stream in its place, are measured under the same load.
`python mock_node.py PORT BOOTSTRAP_PORT` (0: none). Each chunk carries the time it was written (`"t"`, seconds of the
machine's monotonic clock). Token ids are told to whoever asks for them (`return_token_ids`), as vLLM does.
"""

import asyncio
import re
import resource
import sys
import time

import uvloop

STEP_S = 0.02
_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
_TOKENS = re.compile(rb'"max_(?:completion_)?tokens": ?(\d+)')
_FILL = (
    b'"object":"chat.completion.chunk","created":1,"model":"tiny","choices":[{"index":0,"delta":{"content":" word"},'
)
_WHOLE = (
    b'{"id":"x","object":"chat.completion","created":1,"model":"tiny","choices":[{"index":0,"message":{"role":'
    b'"assistant","content":" word"},"finish_reason":"length"}],"usage":{"prompt_tokens":500,"completion_tokens":1,'
    b'"total_tokens":501},"kv_transfer_params":null,"prompt_token_ids":%b}'
)
_PROMPT_IDS = b"[" + b",".join(b"%d" % (1000 + n) for n in range(500)) + b"]"
_GET = {
    b"/health": b"{}",
    b"/v1/models": b'{"object":"list","data":[{"id":"tiny","object":"model","max_model_len":100000}]}',
    b"/metrics": b"vllm:num_requests_running 0\n",
    b"/query": b'{"0":{"engine_id":"e","worker_addr":{"0":{"0":"tcp://127.0.0.1:1"}}}}',
    b"/get_server_info": b"{}",
    b"/version": b'{"version":"0.32.0"}',
}


class Node(asyncio.Protocol):
    """One connection."""

    streaming: dict["Node", int] = {}  # noqa: RUF012
    answering: list[tuple["Node", bytes]] = []  # noqa: RUF012
    tells_ids = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]
        self.buffer = b""

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self.streaming.pop(self, None)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (head := self.buffer.find(b"\r\n\r\n")) >= 0:
            length = _LENGTH.search(self.buffer, 0, head)
            end = head + 4 + (int(length.group(1)) if length else 0)
            if len(self.buffer) < end:
                return
            request, self.buffer = self.buffer[:end], self.buffer[end:]
            self.answer(request, head)

    def answer(self, request: bytes, head: int) -> None:
        method, path, _ = request.split(b" ", 2)
        if method == b"GET":
            self.whole(_GET.get(path.split(b"?")[0], b"{}"))
        elif b'"stream":true' in request[head:] or b'"stream": true' in request[head:]:
            tokens = _TOKENS.search(request, head)
            head_lines = (
                b"HTTP/1.1 200 OK",
                b"content-type: text/event-stream",
                b"transfer-encoding: chunked",
                b"",
                b"",
            )
            self.transport.write(b"\r\n".join(head_lines))
            self.streaming[self] = int(tokens.group(1)) if tokens else 16
            self.tells_ids = b'"return_token_ids":true' in request[head:]
        else:
            ids = _PROMPT_IDS if b'"return_token_ids":true' in request[head:] else b"null"
            self.answering.append((self, _WHOLE % ids))

    def whole(self, body: bytes) -> None:
        self.transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
        )


def event(*, last: bool, tells_ids: bool) -> bytes:
    finish = b'"finish_reason":"length"' if last else b'"finish_reason":null'
    ids = b"[12345]" if tells_ids else b"null"
    payload = b'data: {"id":"chatcmpl-x","t":%.6f,%b%b,"token_ids":%b}]}\n\n' % (time.monotonic(), _FILL, finish, ids)
    return b"%x\r\n%b\r\n" % (len(payload), payload)


async def step_for_ever() -> None:
    """On an absolute schedule: what a step took is not added to the next one."""
    due = time.monotonic()
    end = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
    while True:
        due += STEP_S
        await asyncio.sleep(max(0, due - time.monotonic()))
        for node, body in Node.answering:
            node.whole(body)
        Node.answering.clear()
        for node, left in list(Node.streaming.items()):
            node.transport.write(event(last=left == 1, tells_ids=node.tells_ids) + (end if left == 1 else b""))
            if left == 1:
                del Node.streaming[node]
            else:
                Node.streaming[node] = left - 1


async def main() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    loop = asyncio.get_running_loop()
    for port in filter(None, map(int, sys.argv[1:])):
        await loop.create_server(Node, "127.0.0.1", port, backlog=4096)
    await step_for_ever()


if __name__ == "__main__":
    uvloop.run(main())
