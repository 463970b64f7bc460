#!/bin/bash
# Run by Lima in the guest, as root, at every boot; does its work once.
# Docker Engine with compose and buildx from Docker, else Debian's.
set -eux -o pipefail
marker=/var/lib/agent-vm/done/30-docker
[ ! -e "$marker" ] || exit 0
mkdir -p "${marker%/*}"
exec > >(tee -a /var/log/agent-vm-provision.log) 2>&1
: "${PARAM_minimal:=false}"
user='{{.User}}'  # Lima fills it in

step() { { set +x; } 2>/dev/null; echo "agent-vm: $1"; set -x; }
note() { echo "$1" >> /var/lib/agent-vm/notes; }

export DEBIAN_FRONTEND=noninteractive

from_docker() {
  local key=/etc/apt/keyrings/docker.asc
  curl -fsSL --connect-timeout 10 --retry 1 -o "$key" \
    https://download.docker.com/linux/debian/gpg || return
  cat > /etc/apt/sources.list.d/docker.sources <<SOURCES
Types: deb
URIs: https://download.docker.com/linux/debian
Suites: $(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)
Components: stable
Signed-By: $key
SOURCES
  apt-get update && apt-get install -y --no-install-recommends \
    docker-ce docker-ce-cli containerd.io docker-buildx-plugin docker-compose-plugin
}

from_debian() {
  rm -f /etc/apt/sources.list.d/docker.sources /etc/apt/keyrings/docker.asc
  apt-get install -y --no-install-recommends docker.io docker-cli docker-buildx docker-compose
  note "Docker Engine from Debian: Docker's repository could not be reached."
}

if [ "$PARAM_minimal" != true ]; then
  step "installing Docker"
  from_docker || from_debian
  usermod -aG docker "$user"
  # Pulls need the host's proxy variables, which Lima writes to /etc/environment.
  install -D -m 644 /dev/stdin /etc/systemd/system/docker.service.d/environment.conf <<'UNIT'
[Service]
EnvironmentFile=-/etc/environment
UNIT
  # The daemon starts with the first docker command: a clone that does not use it boots faster.
  systemctl daemon-reload
  systemctl disable --now docker.service containerd.service
  systemctl enable --now docker.socket
fi

touch "$marker"
