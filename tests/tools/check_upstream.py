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


async def differences(options: argparse.Namespace) -> int:
    upstream = proxy.build_repository(options).upstream
    headers = {"X-MCP-Toolsets": "all"}
    begun, session = await proxy.own_request(upstream, "initialize", proxy.OWN_INITIALIZE, headers)
    headers.update({"Mcp-Session-Id": session, "MCP-Protocol-Version": proxy.OWN_VERSION})
    listed, _ = await proxy.own_request(upstream, "tools/list", {}, headers)
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
        known = {*tool.parameters.rules, *(("owner", "repo") if tool.scoped else ())}
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
