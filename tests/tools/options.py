#!/usr/bin/env python3
"""Write docs/options.md from the parsers of the three scripts.

usage: options.py [--check]     with --check: change nothing, exit 1 when the page differs
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import agent_vm  # noqa: E402
import github_app_token  # noqa: E402
import github_mcp_proxy  # noqa: E402

PAGE = ROOT / "docs" / "options.md"
TOP = """\
# Options

Made from the parsers by `make docs`; `--help` says the same. A flag of `agent_vm.py` replaces the
variable `AGENT_VM_NAME` (dashes made underscores), which replaces the key in
`~/.config/agent-vm/config.ini`, section `[/PATH/OF/THE/PROJECT]`, then `[agent-vm]`; `agent-vm
doctor -v` shows what holds.
"""
SCRIPTS = (
    ("agent_vm.py", agent_vm.build_parser()),
    ("github_mcp_proxy.py", github_mcp_proxy.build_parser()),
    ("github_app_token.py", github_app_token.build_parser()),
)


def verbs_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def rows(parser: argparse.ArgumentParser) -> Iterator[str]:
    """A table row an option or argument, without --help and --version."""
    for action in parser._actions:
        if action.dest in ("help", "version") or isinstance(action, argparse._SubParsersAction):
            continue
        flags = [flag for flag in action.option_strings if not flag.startswith("--no-")]
        value = str(action.metavar or action.dest.upper())
        name = ", ".join(flags) or value
        if action.choices:
            name = name if flags else "|".join(map(str, action.choices))
        takes_value = action.nargs != 0 and not isinstance(action, argparse.BooleanOptionalAction)
        if flags and takes_value:
            name += f" {value}"
        if isinstance(action, argparse.BooleanOptionalAction):
            name += f", --no-{flags[0][2:]}"
        explained = (action.help or "").replace("%(default)s", str(action.default))
        name, explained = name.replace("|", "\\|"), explained.replace("|", "\\|")
        yield f"| `{name}` | {explained} |"


def page() -> str:
    parts = [TOP]
    for script, parser in SCRIPTS:
        parts.append(f"\n## {script}\n")
        own = list(rows(parser))
        if own:
            parts.append("\n| Option | |\n|---|---|\n" + "\n".join(own) + "\n")
        for verb, sub in verbs_of(parser).items():
            parts.append(f"\n### {verb}\n\n{sub.description or ''}\n".replace("\n\n\n", "\n"))
            options = list(rows(sub))
            if options:
                parts.append("\n| Option | |\n|---|---|\n" + "\n".join(options) + "\n")
    return "".join(parts)


def main(argv: list[str]) -> int:
    made = page()
    if argv == ["--check"]:
        if not PAGE.is_file() or PAGE.read_text() != made:
            print("docs/options.md is not what the parsers say: run make docs", file=sys.stderr)
            return 1
        return 0
    PAGE.write_text(made)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
