#!/usr/bin/env python3
"""Print how an upstream's tools differ from the table; exit 1 when a row of it is concerned.

usage: as github_mcp_proxy.py, whose environment and --upstream it takes.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import github_mcp_proxy as proxy

TABLE_MADE_FROM = "github-mcp-server v1.10.1"


async def ask(upstream: proxy.Upstream, method: str, params: proxy.Object) -> proxy.Object:
    forward = proxy.Forward({"jsonrpc": "2.0", "id": 1, "method": method, "params": params})
    exchange = await upstream.post(forward, {"X-MCP-Toolsets": "all"})
    kind, found = "", forward.message
    while kind != "answer":
        kind, found, _ = await exchange.next_message(forward)
    exchange.abort()
    result: proxy.Object = found["result"]
    return result


async def differences(options: argparse.Namespace) -> int:
    upstream = proxy.build_repository(options).upstream
    client = {"name": "agent-vm-github-mcp-proxy", "version": proxy.__version__}
    initialize = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": client}
    begun = await ask(upstream, "initialize", initialize)
    listed = await ask(upstream, "tools/list", {})
    version = (begun.get("serverInfo") or {}).get("version")
    print(f"upstream {version}, table made from {TABLE_MADE_FROM}")
    offered = {
        tool["name"]: set(tool["inputSchema"].get("properties", {})) for tool in listed["tools"]
    }
    print("not in the table: " + ", ".join(sorted(offered.keys() - proxy.TOOLS.keys())))
    print("not offered now: " + ", ".join(sorted(proxy.TOOLS.keys() - offered.keys())))
    status = 0
    for name in sorted(offered.keys() & proxy.TOOLS.keys()):
        tool = proxy.TOOLS[name]
        known = {*tool.parameters, *(("owner", "repo") if tool.scoped else ())}
        for mark, keys in (("+", offered[name] - known), ("-", known - offered[name])):
            for key in sorted(keys):
                status = 1
                print(f"{mark} {name}: {key}")
    return status


def main() -> int:
    try:
        return asyncio.run(differences(proxy.build_parser().parse_args()))
    except (proxy.ProxyError, proxy.UpstreamError) as error:
        print(f"check_upstream: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
