"""The proxy with its policy taken out: what is left is the transport, for the conformance suite.

usage: as github_mcp_proxy.py. The program itself has no such switch.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import github_mcp_proxy as proxy


def decide(scope: Any, policy: Any, message: proxy.Object, seen: Any = None) -> proxy.Verdict:
    return proxy.Forward(message)


def answer(scope: Any, policy: Any, forward: Any, message: proxy.Object) -> proxy.Object:
    return message


def mirror_headers(headers: Mapping[str, str], message: proxy.Object) -> dict[str, str]:
    return {k: v for k, v in headers.items() if k.startswith("mcp-") and k != "mcp-session-id"}


def kind_of(message: Any, forward: Any) -> str:
    if "method" in message:
        return "question" if "id" in message else "note"
    return "answer"


vars(proxy).update(
    decide=decide,
    answer=answer,
    mirror_headers=mirror_headers,
    kind_of=kind_of,
    check_mirrored=lambda headers, message: None,
)
sys.exit(proxy.main())
