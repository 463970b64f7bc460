#!/bin/bash
# Run by Lima in the guest, as root, at every boot; does its work once.
# Node.js 22 and npm from NodeSource, else Debian's.
set -eux -o pipefail
marker=/var/lib/agent-vm/done/20-node
[ ! -e "$marker" ] || exit 0
mkdir -p "${marker%/*}"
exec > >(tee -a /var/log/agent-vm-provision.log) 2>&1
: "${PARAM_minimal:=false}" "${PARAM_npmRegistry:=}"

step() { { set +x; } 2>/dev/null; echo "agent-vm: $1"; set -x; }
fail() { step "error: $1"; exit 1; }
note() { echo "$1" >> /var/lib/agent-vm/notes; }

export DEBIAN_FRONTEND=noninteractive

from_nodesource() {
  local key=/etc/apt/keyrings/nodesource.asc
  curl -fsSL --connect-timeout 10 --retry 1 -o "$key" \
    https://deb.nodesource.com/gpgkey/nodesource-repo.gpg.key || return
  cat > /etc/apt/sources.list.d/nodesource.sources <<SOURCES
Types: deb
URIs: https://deb.nodesource.com/node_22.x
Suites: nodistro
Components: main
Signed-By: $key
SOURCES
  apt-get update && apt-get install -y --no-install-recommends 'nodejs=22.*'
}

from_debian() {
  rm -f /etc/apt/sources.list.d/nodesource.sources /etc/apt/keyrings/nodesource.asc
  apt-get install -y --no-install-recommends nodejs npm
  note "Node.js $(node --version) from Debian: NodeSource could not be reached."
}

if [ "$PARAM_minimal" != true ]; then
  step "installing Node.js"
  from_nodesource || from_debian
  if [ -n "$PARAM_npmRegistry" ]; then
    [[ $PARAM_npmRegistry =~ ^https?://[^[:space:]]+$ ]] ||
      fail "--npm-registry is not an http(s) URL"
    npm config set --location=global registry "${PARAM_npmRegistry%/}/"
  fi
fi

touch "$marker"
