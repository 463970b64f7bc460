#!/usr/bin/env python3
"""What Lima starts in place of QEMU: QEMU itself, with the guest's network closed by the host.

Lima finds this file by QEMU_SYSTEM_<ARCH>. AGENT_VM_QEMU holds JSON: {"program": "/PATH/OF/QEMU",
"restrict": true}. Questions about QEMU's features are passed on as they are. A machine is started
only with the one network device that Lima writes; to it `restrict=on` is added. Then QEMU itself
passes no packet between the guest and the host, its network or the internet, whatever the guest's
root does (QEMU's manual, "-netdev user"); what its `hostfwd` names, ssh, comes in as before.

Starts:   QEMU, in its own place
Reads:    AGENT_VM_QEMU
Writes:   nothing
Reaches:  nothing
"""

from __future__ import annotations

import json
import os
import re
import sys

# All of it, as Lima 2.2 writes it (pkg/driver/qemu/qemu.go): not a word more may be in it.
NETDEV = re.compile(
    r"user,id=net0,net=[0-9.]+/[0-9]+,dhcpstart=[0-9.]+,hostfwd=tcp:127\.0\.0\.1:[0-9]+-:22"
).fullmatch
# Other ways to a network, and options that read options from elsewhere.
CLOSED = ("nic", "net", "readconfig", "set", "redir", "smb", "tftp", "bootp", "nodefconfig")


class Refused(Exception):
    """Why no machine is started."""


# --- pure: what is started ---


def is_question(words: list[str]) -> bool:
    """Whether it is one of Lima's about QEMU (`-M none -netdev help`), which starts no machine."""
    return words == ["--version"] or (len(words) <= 4 and "help" in words)


def restricted(words: list[str]) -> list[str]:
    """A machine's arguments with its network closed; Refused when they are not what Lima writes.

    QEMU takes each option with one dash or two, and of one that is given twice both.
    """
    options = [re.sub("^--?", "", word) if word[:1] == "-" else "" for word in words]
    for option in options:
        if option in CLOSED:
            raise Refused(f"-{option} is not one of its options")
    places = [at for at, option in enumerate(options) if option == "netdev"]
    if len(places) != 1:
        raise Refused(f"it has {len(places)} network devices, not one")
    value = "".join(words[places[0] + 1 : places[0] + 2])
    if not NETDEV(value):
        raise Refused(f"its network device is not the one that Lima writes: {value!a}")
    return [*words[: places[0] + 1], f"{value},restrict=on", *words[places[0] + 2 :]]


# --- the story: one start ---


def main(argv: list[str]) -> int:
    try:
        asked = json.loads(os.environ.pop("AGENT_VM_QEMU", "{}"))
        program, is_open = asked["program"], asked["restrict"] is False
        words = argv if is_open or is_question(argv) else restricted(argv)
        os.execv(program, [program, *words])
    except (ValueError, LookupError, TypeError):
        print("agent-vm: AGENT_VM_QEMU is not what a run of agent-vm sets", file=sys.stderr)
    except Refused as refused:
        print(f"agent-vm: the VM would not be confined: {refused}", file=sys.stderr)
    except OSError as error:
        print(f"agent-vm: QEMU cannot be started: {error}", file=sys.stderr)
    return 1


# --- you may stop here: what follows only calls what is above ---

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
