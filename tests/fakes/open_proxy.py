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


def decide(bounds: Any, message: proxy.Object) -> proxy.Verdict:
    return proxy.Forward(message)


def checked_answer(bounds: Any, forward: Any, message: proxy.Object) -> proxy.Object:
    return message


def version_headers_of(headers: Mapping[str, str], message: proxy.Object) -> dict[str, str]:
    names = [name for name in headers if name.startswith("mcp-") and name != "mcp-session-id"]
    return {name: headers[name] for name in names}


def kind_of(message: Any, forward: Any) -> str:
    is_note = "method" in message and "id" not in message
    return "note" if is_note else judged_kind_of(message, forward)


judged_kind_of = proxy.kind_of
vars(proxy).update(
    decide=decide,
    version_headers_of=version_headers_of,
    mirrored_headers=lambda message: {},
    kind_of=kind_of,
)
proxy.Client.shown = staticmethod(checked_answer)
sys.exit(proxy.main())
