#!/usr/bin/env python3
"""What Lima starts in place of QEMU: QEMU itself, as the run of agent-vm asks.

Lima finds this file by QEMU_SYSTEM_<ARCH>. AGENT_VM_QEMU holds JSON: {"program": "/PATH/OF/QEMU",
"restrict": true, "mounts": [["/PATH", writable], …]}, and to save or resume a machine {"saved":
"/FOLDER", "resume": true}. Questions about features are passed on. A closed machine has only the
one network device that Lima writes, with `restrict=on`: QEMU passes no packet between the guest and
the host, its network or the internet, whatever the guest's root does; ssh comes in by `hostfwd`.

Starts:   QEMU, in its own place
Reads:    AGENT_VM_QEMU, /proc/cpuinfo, machine.json of a saved machine
Writes:   that file, of a machine that is going to be saved
Reaches:  nothing
"""

from __future__ import annotations

import json
import os
import re
import sys
from typing import Any

# All of it, as Lima 2.2 writes it (pkg/driver/qemu/qemu.go): not a word more may be in it.
NETDEV = re.compile(
    r"user,id=net0,net=[0-9.]+/[0-9]+,dhcpstart=[0-9.]+,hostfwd=tcp:127\.0\.0\.1:[0-9]+-:22"
).fullmatch
# Other ways to a network, and options that read options from elsewhere.
CLOSED = ("nic", "net", "readconfig", "set", "redir", "smb", "tftp", "bootp", "nodefconfig")
CPU = re.compile("^(?:model name|flags|Features|CPU p).*", re.MULTILINE).findall  # of cpuinfo
OWN = re.compile(r"mac=[0-9a-f:]+|127\.0\.0\.1:[0-9]+|^lima-.*")  # of each clone


class Refused(Exception):
    """Why no machine is started."""


# --- pure: what is started ---


def is_question(words: list[str]) -> bool:
    """Whether it is one of Lima's about QEMU (`-M none -netdev help`), which starts no machine."""
    return words == ["--version"] or (len(words) <= 4 and "help" in words)


def restricted(words: list[str]) -> list[str]:
    """A machine's arguments with its network closed; Refused when they are not what Lima writes.
    QEMU takes each option with one dash or two, and of one that is given twice both."""
    options = [re.sub("^--?", "", word) if word[:1] == "-" else "" for word in words]
    for option in set(options).intersection(CLOSED):
        raise Refused(f"-{option} is not one of its options")
    places = [at for at, option in enumerate(options) if option == "netdev"]
    if len(places) != 1:
        raise Refused(f"it has {len(places)} network devices, not one")
    value = "".join(words[places[0] + 1 : places[0] + 2])
    if not NETDEV(value):
        raise Refused(f"its network device is not the one that Lima writes: {value!a}")
    return [*words[: places[0] + 1], f"{value},restrict=on", *words[places[0] + 2 :]]


def added(words: list[str], asked: dict[str, Any]) -> list[str]:
    """The host's folders, in slots that the guest knows by their tags, and the memory's file, whose
    pages resumed machines share until they write; by vmgenid the guest knows it is another.
    """
    more = []
    for slot, (path, writable) in enumerate(asked["mounts"]):
        shared = f"local,mount_tag=agent-vm-{slot},path={path.replace(',', ',,')}"
        more += ["-virtfs", f"{shared},security_model=none{'' if writable else ',readonly=on'}"]
    if "saved" in asked:
        size, share = words[words.index("-m") + 1], "off" if asked["resume"] else "on"
        file = f"{asked['saved']}/memory".replace(",", ",,")
        backend = f"memory-backend-file,id=mem,size={size}M,mem-path={file},share={share}"
        more += ["-object", backend, "-machine", "memory-backend=mem"]
        more += ["-device", "vmgenid,guid=auto", *(["-incoming", "defer"] * asked["resume"])]
    return more


# --- the story: one start ---


def compared(words: list[str], asked: dict[str, Any]) -> None:
    """Note which machine is going to be saved; Refused when one to be resumed is another by now."""
    folder, info = os.path.dirname(words[words.index("-pidfile") + 1]), os.stat(asked["program"])
    cpu = open("/proc/cpuinfo").read() if os.path.exists("/proc/cpuinfo") else ""
    now = {
        "what Lima gives to QEMU": [OWN.sub("", word.replace(folder, "")) for word in words],
        "QEMU itself": [asked["program"], info.st_size, info.st_mtime_ns],
        "the host's kernel or CPU": [os.uname().release, *sorted(set(CPU(cpu)))],
        "the number of folders": len(asked["mounts"]),
    }
    with open(f"{asked['saved']}/machine.json", "r" if asked["resume"] else "w") as file:
        if not asked["resume"]:
            json.dump(now, file)
            return
        before = json.load(file)
    for what in now:
        if now[what] != before[what]:
            raise Refused(f"{what} is not as it was saved")


def main(argv: list[str]) -> int:
    try:
        asked = json.loads(os.environ.pop("AGENT_VM_QEMU", "{}"))
        words, is_open = argv, asked["restrict"] is False
        if not is_question(argv):
            words = [*(argv if is_open else restricted(argv)), *added(argv, asked)]
            if "saved" in asked:
                compared(argv, asked)
        os.execv(asked["program"], [asked["program"], *words])
    except (ValueError, LookupError, TypeError):
        print("agent-vm: AGENT_VM_QEMU is not what a run of agent-vm sets", file=sys.stderr)
    except (Refused, OSError) as error:
        print(f"agent-vm: the VM is not started: {error}", file=sys.stderr)
    return 1


# --- you may stop here: what follows only calls what is above ---

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
