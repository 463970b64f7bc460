#!/usr/bin/env python3
"""A model that knows two answers, behind the Anthropic Messages API on loopback.

usage: model_api.py LOG       prints its port; runs until its stdin closes
The first answer asks for the Bash tool with COMMAND; where the prompt is "use mcp__TOOL", for that
one, searched for before. The answer after it is the text "all done". Each request is a JSON line in
LOG: path, credential headers, number of messages.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from http.server import ThreadingHTTPServer
from typing import Any

COMMAND = "echo written by the agent > agent.txt"


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The message that a request gets: a tool call first, text once a tool has answered."""
    last = request["messages"][-1]["content"]
    tool_answered = isinstance(last, list) and any(part["type"] == "tool_result" for part in last)
    tools = {tool.get("name") for tool in request.get("tools", [])}
    said = json.dumps(request["messages"])
    named = re.search(r"use (mcp__\w+)", said)
    call: tuple[str, dict[str, str]] | None = None
    if named and "Bash" in tools:
        if named[1] not in tools and '"name": "ToolSearch"' not in said:
            call = "ToolSearch", {"query": f"select:{named[1]}"}
        elif f'"name": "{named[1]}"' not in said:
            call = named[1], {}
    elif "Bash" in tools and not tool_answered:
        call = "Bash", {"command": COMMAND, "description": "write a file"}
    if call:
        tool_use = {"type": "tool_use", "id": f"toolu_{uuid.uuid4().hex}", "name": call[0]}
        content, reason = {**tool_use, "input": call[1]}, "tool_use"
    else:
        content, reason = {"type": "text", "text": "all done"}, "end_turn"
    return {
        "id": f"msg_{uuid.uuid4().hex}",  # Claude Code drops a message whose id it has seen
        "type": "message", "role": "assistant", "model": request["model"],
        "content": [content], "stop_reason": reason, "stop_sequence": None,
        "usage": {"input_tokens": 1, "output_tokens": 1},
    }  # fmt: skip


def events(message: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The same message as a stream: its one content block in one delta."""
    content = message["content"][0]
    if content["type"] == "text":
        start, delta = {**content, "text": ""}, {"type": "text_delta", "text": content["text"]}
    else:
        call = json.dumps(content["input"])
        start, delta = {**content, "input": {}}, {"type": "input_json_delta", "partial_json": call}
    yield {"type": "message_start", "message": {**message, "content": [], "stop_reason": None}}
    yield {"type": "content_block_start", "index": 0, "content_block": start}
    yield {"type": "content_block_delta", "index": 0, "delta": delta}
    yield {"type": "content_block_stop", "index": 0}
    end = {"stop_reason": message["stop_reason"], "stop_sequence": None}
    yield {"type": "message_delta", "delta": end, "usage": {"output_tokens": 1}}
    yield {"type": "message_stop"}


class Handler(BaseHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass

    def send(self, body: str, content_type: str = "application/json", status: int = 200) -> None:
        data = body.encode()
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_HEAD(self) -> None:
        self.send("")

    def do_GET(self) -> None:
        self.send("{}", status=404)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request = json.loads(body or b"{}")
        with open(sys.argv[1], "a") as log:
            entry = {"path": self.path, "messages": len(request.get("messages", []))}
            entry |= {name: self.headers.get(name) for name in ("authorization", "x-api-key")}
            log.write(json.dumps(entry) + "\n")
        if "count_tokens" in self.path or "messages" not in request:
            self.send('{"input_tokens": 1}')
        elif request.get("stream"):
            stream = "".join(
                f"event: {event['type']}\ndata: {json.dumps(event)}\n\n"
                for event in events(answer(request))
            )
            self.send(stream, "text/event-stream")
        else:
            self.send(json.dumps(answer(request)))


def main() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_address[1], flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
