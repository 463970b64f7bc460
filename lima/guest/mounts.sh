#!/bin/bash
# Sent by a run into its VM, as its user: the folders of the host, each in its place, as the file
# `mounts` says. QEMU has one in a slot with a tag; in another VM Lima has mounted it. An agent in
# an empty folder would lose its work.
# shellcheck disable=SC1091
set -eu -o pipefail
cd ~/.agent-vm
mount_slot() {  # SLOT TARGET rw|ro|copy
  local lima=/mnt/agent-vm/$1 target=$2 how=${3/copy/ro}
  [ "$3" != copy ] || target=~/.agent-vm/copied
  [ -d "$target" ] || sudo mkdir -p "$target"
  if mountpoint -q "$lima"; then
    sudo mount --bind "$lima" "$target"
  else
    # Other ways to cache show old contents for minutes after the host has written a file anew.
    sudo mount -t 9p -o "trans=virtio,version=9p2000.L,msize=131072,cache=mmap,$how" \
      "agent-vm-$1" "$target"
  fi
  [ "$3" != copy ] || cp -Rn "$target/." "$2" || true
}
. ./mounts
