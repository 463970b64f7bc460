#!/bin/bash
# Run by Lima in the guest, as root, at every boot; does its work once.
# A kernel that can mount the project, a small disk, and the marker that says that all went well.
set -eux -o pipefail
marker=/var/lib/agent-vm/done/50-finish
[ ! -e "$marker" ] || exit 0
mkdir -p "${marker%/*}"
exec > >(tee -a /var/log/agent-vm-provision.log) 2>&1

step() { { set +x; } 2>/dev/null; echo "agent-vm: $1"; set -x; }
fail() { step "error: $1"; exit 1; }

export DEBIAN_FRONTEND=noninteractive

for name in 10-packages 20-node 30-docker 40-agent; do
  [ -e "${marker%/*}/$name" ] || fail "$name failed"
done

# Under QEMU the project is mounted over 9p, which Debian's cloud kernel lacks. The next boot uses
# the generic one.
if ! modprobe -n -q 9p && [[ $(systemd-detect-virt) =~ ^(qemu|kvm)$ ]]; then
  step "installing a kernel with 9p"
  apt-get install -y --no-install-recommends "linux-image-$(dpkg --print-architecture)"
  apt-get purge -y '?installed?name(^linux-image-.*cloud)'
fi

step "cleaning up"
apt-get clean
rm -rf /var/lib/apt/lists/*
fstrim / || true  # gives the freed blocks back to the host's disk file

step "the base instance is complete"
touch "$marker"
