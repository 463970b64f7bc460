#!/bin/bash
# Run by Lima in the guest, as root, at every boot; does its work once.
# Claude Code from its vendor's installer, else from npm; then the Chrome DevTools MCP server.
set -eux -o pipefail
marker=/var/lib/agent-vm/done/40-agent
[ ! -e "$marker" ] || exit 0
mkdir -p "${marker%/*}"
exec > >(tee -a /var/log/agent-vm-provision.log) 2>&1
: "${PARAM_minimal:=false}" "${PARAM_npmRegistry:=}"
user='{{.User}}' home='{{.Home}}'  # Lima fills them in

step() { { set +x; } 2>/dev/null; echo "agent-vm: $1"; set -x; }
fail() { step "error: $1"; exit 1; }
note() { echo "$1" >> /var/lib/agent-vm/notes; }
fetch() { curl -fsSL --connect-timeout 10 --speed-time 60 --retry 2 "$@"; }
# runuser keeps the environment, and with it the proxy variables.
as_user() { runuser -u "$user" -- env HOME="$home" "$@"; }

work=$(mktemp -d -p /var/tmp)  # /tmp is memory
chmod 755 "$work"
trap 'rm -rf "$work"' EXIT

from_vendor() {
  fetch -o "$work/install.sh" https://claude.ai/install.sh &&
    as_user timeout 900 bash "$work/install.sh" &&
    as_user "$home/.local/bin/claude" --version &&
    ln -sf "$home/.local/bin/claude" /usr/local/bin/claude
}

npm_registry() {
  if [ -n "$PARAM_npmRegistry" ]; then
    echo "${PARAM_npmRegistry%/}"
  elif command -v npm > /dev/null; then
    npm config get registry | sed 's#/$##'
  fi
}

# The package holds one native binary, so neither Node.js nor npm is needed.
from_npm() {
  local registry package dist integrity
  registry=$(npm_registry)
  [ -n "$registry" ] ||
    fail "Claude Code's installer could not be reached and no npm registry is known: --npm-registry"
  package=claude-code-linux-$(dpkg --print-architecture | sed 's/amd64/x64/')
  fetch -o "$work/package.json" "$registry/@anthropic-ai%2f$package" ||
    fail "the npm registry gives no $package"
  dist=$(jq -c '.versions[."dist-tags".latest].dist' "$work/package.json")
  integrity=$(jq -r '.integrity' <<< "$dist")
  [[ $integrity == sha512-* ]] || fail "the npm registry gives no sha512 for $package"
  fetch -o "$work/claude.tgz" "$(jq -r '.tarball' <<< "$dist")" ||
    fail "the npm registry gives no tarball of $package"
  echo "$(base64 -d <<< "${integrity#sha512-}" | basenc --base16 -w0)  $work/claude.tgz" |
    sha512sum --check --strict ||
    fail "the tarball of $package is not what the npm registry promised"
  tar -xzf "$work/claude.tgz" -C /usr/local/bin --no-same-owner --strip-components=1 package/claude
  as_user claude --version
  note "Claude Code from npm: its installer could not be reached."
}

step "installing Claude Code"
[[ -z $PARAM_npmRegistry || $PARAM_npmRegistry =~ ^https?://[^[:space:]]+$ ]] ||
  fail "--npm-registry is not an http(s) URL"
if ! from_vendor; then
  from_npm
fi

if [ "$PARAM_minimal" != true ]; then
  step "installing the Chrome DevTools MCP server"
  if npm install -g --cache "$work/npm" --no-audit --no-fund --fetch-retries=1 \
    chrome-devtools-mcp; then
    as_user claude mcp add --scope user chrome-devtools -- \
      chrome-devtools-mcp --headless --isolated --executablePath /usr/bin/chromium \
      --no-usage-statistics --no-performance-crux
  else
    note "No Chrome DevTools MCP server: npm could not install it."
  fi
fi

touch "$marker"
