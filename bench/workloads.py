"""What the contenders read: event streams made here, each with its right answer.

A workload is a list of blocks, one event each, as a server writes them. A cut is how
the bytes reach the reader: one block per read, or slices of a fixed size.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

Event: TypeAlias = tuple[str, str, str]
"""The event's name, its data and its own id ("" where it has none)."""

BLOCK = 0
"""The cut that hands over one event per read, as httpx does with chunked answers."""

CUT_NAMES = {
    65_536: "64 KiB",
    1_460: "1,460 B",
    BLOCK: "one event",
    16: "16 B",
    1: "1 B",
}
TCP_CUTS = (65_536, 1_460)
LARGE_CUTS = (*TCP_CUTS, BLOCK)
TINY_CUTS = (16, 1)

LAYOUT = "data: {}\n\n"
DONE = b"data: [DONE]\n\n"
ASCII_WORDS = (
    *("The", " quick", " brown", " fox", " jumps", " over", " the", " lazy", " dog"),
    *(".", " It", " isn't", ' "real"', ",", " but\n", " unbelievably", " so", "!"),
)
CJK_WORDS = (
    *("你好", "，", "世界", "流", "式", "输出", "很", "快", "。", "日本", "語", "한국"),
)


@dataclass(frozen=True)
class Workload:
    """An event stream and the events that it holds."""

    name: str
    blocks: list[bytes]
    events: list[Event]

    @property
    def body(self) -> bytes:
        """The whole stream."""
        return b"".join(self.blocks)

    def pieces(self, cut: int) -> list[bytes]:
        """The stream as it is read: slices of `cut` bytes, or block by block."""
        if cut == BLOCK:
            return self.blocks
        body = self.body
        return [body[i : i + cut] for i in range(0, len(body), cut)]


def to_json(value: object) -> str:
    """JSON as OpenAI, Ollama and vLLM send it: no blanks, no ASCII escapes."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def chunk_json(delta: dict[str, object], finish_reason: str | None = None) -> str:
    """One chat.completion.chunk in the layout that Ollama's /v1 route sends."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return to_json(
        {
            "id": "chatcmpl-476",
            "object": "chat.completion.chunk",
            "created": 1752575345,
            "model": "deepseek-r1:1.5b",
            "system_fingerprint": "fp_ollama",
            "choices": [choice],
        }
    )


def text_payloads(count: int, words: Sequence[str]) -> list[str]:
    """`count` chunks of one word each."""
    return [
        chunk_json({"role": "assistant", "content": words[i % len(words)]})
        for i in range(count)
    ]


def tool_payloads(count: int) -> list[str]:
    """`count` chunks of tool calls: an opening, then 15 pieces of its arguments."""
    payloads = []
    for i in range(count):
        call: dict[str, object] = {"index": i // 16}
        if i % 16 == 0:
            function = {"name": "get_weather", "arguments": ""}
            call |= {"id": f"call_{i:08d}", "type": "function", "function": function}
        else:
            call |= {"function": {"arguments": f'"k{i % 16}": {i}, '}}
        payloads.append(chunk_json({"tool_calls": [call]}))
    return payloads


def _plain(name: str, payloads: Sequence[str], layout: str = LAYOUT) -> Workload:
    blocks = [layout.format(payload).encode() for payload in payloads]
    return Workload(name, blocks, [("message", payload, "") for payload in payloads])


def _named(payloads: Sequence[str]) -> Workload:
    blocks, events = [], []
    for i, payload in enumerate(payloads):
        name, event_id = f"chat.delta.{i % 3}", f"{i:06d}"
        blocks.append(f"event: {name}\nid: {event_id}\ndata: {payload}\n\n".encode())
        events.append((name, payload, event_id))
    return Workload("names and ids", blocks, events)


def _many_lines(count: int, lines: int = 20) -> Workload:
    texts = [f"{i} the quick brown fox" for i in range(lines)]
    block = "".join(f"data: {text}\n" for text in texts) + "\n"
    event = ("message", "\n".join(texts), "")
    return Workload("many data lines", [block.encode()] * count, [event] * count)


def one_event(size: int) -> Workload:
    """One event with `size` bytes of data."""
    payload = to_json({"text": "x" * (size - len('{"text":""}'))})
    return _plain("one large event", [payload])


CHAT_WORKLOADS = ("chat, ASCII", "chat, CJK")


def decode_workloads(chats: int, others: int, large: int) -> list[Workload]:
    """Every kind of stream; numbers of events, and the bytes of the one large event."""
    ascii_payloads = text_payloads(chats, ASCII_WORDS)
    ascii_name, cjk_name = CHAT_WORKLOADS
    return [
        _plain(ascii_name, ascii_payloads),
        _plain(cjk_name, text_payloads(chats, CJK_WORDS)),
        _plain("tool calls", tool_payloads(others)),
        _named(ascii_payloads[:others]),
        _plain("CRLF", ascii_payloads[:others], "data: {}\r\n\r\n"),
        _plain("comments", ascii_payloads[:others], ": keep-alive\n\n" + LAYOUT),
        _many_lines(max(1, others // 4)),
        one_event(large),
    ]


def answer(payloads: Sequence[str], finish_reason: str, name: str = "") -> Workload:
    """A whole streamed answer: the payloads, the finish chunk, and [DONE], no event."""
    chunks = _plain(name, [*payloads, chunk_json({}, finish_reason)])
    return Workload(name, [*chunks.blocks, DONE], chunks.events)


def typed_workloads(count: int) -> list[Workload]:
    """Whole chat answers of `count` deltas."""
    ascii_name, cjk_name = CHAT_WORKLOADS
    return [
        answer(text_payloads(count, ASCII_WORDS), "stop", ascii_name),
        answer(text_payloads(count, CJK_WORDS), "stop", cjk_name),
        answer(tool_payloads(count), "tool_calls", "tool calls"),
    ]
