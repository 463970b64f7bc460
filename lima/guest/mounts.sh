#!/bin/bash
# Sent by a run into its VM, as root: the folders of the host, each in its place, as the file
# `mounts` says. QEMU has one in a slot with a tag; in another VM Lima has mounted it. An agent in
# an empty folder would lose its work.
set -eu
mount_slot() {  # SLOT TARGET rw|ro
  [ -d "$2" ] || mkdir -p "$2"
  if [ -d "/mnt/agent-vm/$1" ] && mountpoint -q "/mnt/agent-vm/$1"; then
    mount --bind "/mnt/agent-vm/$1" "$2"
  else
    # Other ways to cache show old contents for minutes after the host has written a file anew.
    mount -t 9p -o "trans=virtio,version=9p2000.L,msize=131072,cache=mmap,$3" "agent-vm-$1" "$2"
  fi
}
# shellcheck disable=SC1091
. ./mounts
