"""Bytes of a body in HTTP's chunked coding, looked at without a parser."""

import re

_FRAME = re.compile(rb"([1-9a-fA-F][0-9a-fA-F]{0,6})\r\n")
_END_OF_EVENT_AND_CHUNK = b"\n\n\r\n"


def are_whole_events(data: bytes) -> bool:
    """Nothing but whole chunks, each of which ends where an event ends, none of them the last.

    Passed on as they are, they stay right. Strict on purpose (no extensions, no leading zeros, LF): what it does not
    know, the parser judges.
    """
    start, length = 0, len(data)
    while start < length:
        head = _FRAME.match(data, start)
        if head is None:
            return False
        start = head.end() + int(head[1], 16) + 2
        if data[start - 4 : start] != _END_OF_EVENT_AND_CHUNK:
            return False
    return start == length
