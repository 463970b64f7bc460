#!/bin/bash
# Run by Lima in the guest, as root, at every boot; does its work once, after 10-base.sh.
# What a run needs answers. The marker says that the base instance is complete.
set -eux -o pipefail
marker=/var/lib/agent-vm/done/20-test
[ ! -e "$marker" ] || exit 0
[ -e "${marker%/*}/10-base" ] || exit 1  # its error is in the log
# Once 10-base.sh has replaced the kernel, the running one has no modules, and no Docker starts.
[ -d "/lib/modules/$(uname -r)/kernel" ] || exit 0
exec > >(tee -a /var/log/agent-vm-provision.log) 2>&1
: "${PARAM_minimal:=false}"
user='{{.User}}' home='{{.Home}}'  # Lima fills them in

say() { { set +x; } 2>/dev/null; echo "agent-vm: $1"; set -x; }
check() {
  runuser -u "$user" -- env -C "$home" HOME="$home" \
    timeout 600 bash -lc "set -e -o pipefail; $1" ||
    { say "error: smoke test failed: $1"; exit 1; }
}

say "testing it"
for tool in claude git jq; do check "$tool --version"; done
if [ "$PARAM_minimal" != true ]; then
  for tool in curl gcc node npm rg fd gh; do check "$tool --version"; done
  check "python3 -m venv /tmp/smoke"
  check "docker compose version"
  check "docker buildx version"
  check "sg docker -c 'docker version'"
  check "chromium --headless --disable-gpu --dump-dom data:text/html,smoke-test | grep smoke-test"
fi
# The next boot may take any installed kernel; each must have the mount type that the host confines.
if [[ $(systemd-detect-virt) =~ ^(qemu|kvm)$ ]]; then
  check "for k in /boot/vmlinuz-*; do /sbin/modinfo -k \"\${k#*/vmlinuz-}\" 9p; done"
fi

say "the base instance is complete"
touch "$marker"
