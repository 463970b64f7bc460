#!/bin/bash
# Run by Lima in the guest, as root, at every boot; does its work once.
# All that is installed, read from top to bottom. The first failure ends it, so the error that the
# log shows is the cause.
set -eux -o pipefail
marker=/var/lib/agent-vm/done/10-base
[ ! -e "$marker" ] || exit 0
mkdir -p "${marker%/*}"
exec > >(tee -a /var/log/agent-vm-provision.log) 2>&1
: "${PARAM_minimal:=false}" "${PARAM_npmRegistry:=}" "${PARAM_aptMirror:=}" "${PARAM_locale:=}"
user='{{.User}}' home='{{.Home}}'  # Lima fills them in
codename=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)
export DEBIAN_FRONTEND=noninteractive

say() { { set +x; } 2>/dev/null; echo "agent-vm: $1"; set -x; }
step() { doing=$1; say "$1"; }
fail() { doing=; say "error: $1"; exit 1; }
note() { echo "$1" >> /var/lib/agent-vm/notes; }
fetch() { curl -fsSL --connect-timeout 10 --speed-time 60 --retry 2 "$@"; }
apt_install() { apt-get install -y --no-install-recommends "$@"; }
# runuser keeps the environment, and with it the proxy variables.
as_user() { runuser -u "$user" -- env HOME="$home" "$@"; }

work=$(mktemp -d -p /var/tmp)  # /tmp is memory
# What fails without words of its own ends here.
ended() { rm -rf "$work"; [ -z "$doing" ] || say "error: $doing failed"; }
trap ended EXIT

step "setting up apt"
cat > /etc/apt/apt.conf.d/90agent-vm <<'CONF'
Acquire::Retries "3";
Acquire::http::Timeout "15";
DPkg::Lock::Timeout "300";
CONF
# No need to survive a power cut while installing: an unfinished base instance is built anew.
echo force-unsafe-io > /etc/dpkg/dpkg.cfg.d/agent-vm
# A disposable VM must not spend its first minutes, and apt's lock, on upgrades.
systemctl mask --now apt-daily.timer apt-daily-upgrade.timer

if [ -n "$PARAM_aptMirror" ]; then
  mirror=${PARAM_aptMirror%/}
  security=${mirror%/*}/debian-security
  # The cloud image names mirror lists (mirror+file:/etc/apt/mirrors/debian.list), others name URLs.
  old='(https?|mirror\+file):/[^ ]*/debian' end='(\.list|/)?( |$)'
  mapfile -t sources < <(
    grep -lsE "$old$end" /etc/apt/sources.list /etc/apt/sources.list.d/debian.sources)
  [ "${#sources[@]}" -gt 0 ] || fail "no Debian mirror to replace in /etc/apt/sources.list*"
  sed -E -i "s#$old$end#$mirror\3#" "${sources[@]}"
  # Mirrors keep the security suite beside the archive, as debian-security. When this one does not,
  # security updates still come from where the image has them: better slow than silently missing.
  if fetch -o /dev/null "$security/dists/$codename-security/InRelease"; then
    sed -E -i "s#$old-security$end#$security\3#" "${sources[@]}"
  else
    note "Security updates from the image's own mirror: --apt-mirror has none."
  fi
fi
apt-get update --error-on=any || note "Some package lists are missing: apt-get update failed."

step "installing packages"
packages=(ca-certificates curl git jq nftables python3-minimal redsocks)  # see guest/network.sh
if [ "$PARAM_minimal" != true ]; then
  packages+=(
    build-essential file less openssh-client procps iproute2 rsync sudo unzip wget
    tzdata tzdata-legacy python3 python3-pip python3-venv
    fd-find gh ripgrep
    kitty-terminfo locales ncurses-term
    chromium fonts-liberation xauth xvfb
  )
  ln -sf /usr/bin/fdfind /usr/local/bin/fd  # Debian's name, because another package has fd
fi
apt_install "${packages[@]}"
systemctl disable --now redsocks.service  # a run starts its own
# The value is the host's LANG, whatever that holds: only a whole line of Debian's list counts.
if grep -sqxF -e "$PARAM_locale UTF-8" /usr/share/i18n/SUPPORTED; then
  echo "$PARAM_locale UTF-8" > /etc/locale.gen
  locale-gen
fi
# The project belongs to the host's user id: git would call that "dubious ownership" and refuse.
git config --system --replace-all safe.directory '*'

# Packages of a vendor's own; when that fails, Debian's are taken, and apt knows the vendor no more.
from_vendor() {  # NAME KEY-URL "URL SUITE COMPONENT" PACKAGE …
  local key=/etc/apt/keyrings/$1.asc list=/etc/apt/sources.list.d/$1.list
  fetch -o "$key" "$2" && echo "deb [signed-by=$key] $3" > "$list" &&
    apt-get update && apt_install "${@:4}" && return
  rm -f "$key" "$list"
  return 1
}

if [ "$PARAM_minimal" != true ]; then
  step "installing Node.js"
  url=https://deb.nodesource.com
  if ! from_vendor nodesource $url/gpgkey/nodesource-repo.gpg.key \
    "$url/node_22.x nodistro main" 'nodejs=22.*'; then
    apt_install nodejs npm
    note "Node.js $(node --version) from Debian: NodeSource could not be reached."
  fi
  [ -z "$PARAM_npmRegistry" ] ||
    npm config set --location=global registry "${PARAM_npmRegistry%/}/"

  step "installing Docker"
  url=https://download.docker.com/linux/debian
  if ! from_vendor docker $url/gpg "$url $codename stable" \
    docker-ce docker-ce-cli containerd.io docker-buildx-plugin docker-compose-plugin; then
    apt_install docker.io docker-cli docker-buildx docker-compose
    note "Docker Engine from Debian: Docker's repository could not be reached."
  fi
  usermod -aG docker "$user"
  # Pulls need the host's proxy variables, which Lima writes to /etc/environment.
  printf '[Service]\nEnvironmentFile=-/etc/environment\n' |
    install -D -m 644 /dev/stdin /etc/systemd/system/docker.service.d/environment.conf
  # The daemon starts with the first docker command: a clone that does not use it boots faster.
  systemctl daemon-reload
  systemctl disable --now docker.service containerd.service
  systemctl enable --now docker.socket
fi

claude_from_vendor() {
  fetch -o "$work/install.sh" https://claude.ai/install.sh &&
    as_user timeout 900 bash < "$work/install.sh" &&
    as_user "$home/.local/bin/claude" --version &&
    ln -sf "$home/.local/bin/claude" /usr/local/bin/claude
}

# The package holds one native binary, so neither Node.js nor npm is needed.
claude_from_npm() {
  local registry=${PARAM_npmRegistry%/} package tarball integrity
  [ -n "$registry" ] || registry=$(npm config get registry | sed 's#/$##') ||
    fail "Claude Code's installer could not be reached and no npm registry is known: --npm-registry"
  package=claude-code-linux-$(dpkg --print-architecture | sed 's/amd64/x64/')
  fetch -o "$work/package.json" "$registry/@anthropic-ai%2f$package" ||
    fail "the npm registry gives no $package"
  read -r tarball integrity < <(
    jq -r '.versions[."dist-tags".latest].dist | "\(.tarball) \(.integrity)"' "$work/package.json")
  fetch -o "$work/claude.tgz" "$tarball" || fail "the npm registry gives no tarball of $package"
  echo "$(base64 -d <<< "${integrity#sha512-}" | basenc --base16 -w0)  $work/claude.tgz" |
    sha512sum --check --strict ||
    fail "the tarball of $package is not what the npm registry promised"
  tar -xzf "$work/claude.tgz" -C /usr/local/bin --no-same-owner --strip-components=1 package/claude
  as_user claude --version
  note "Claude Code from npm: its installer could not be reached."
}

step "installing Claude Code"
claude_from_vendor || claude_from_npm
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

# Under QEMU the project is mounted over 9p, which Debian's cloud kernel lacks. The next boot uses
# the generic one.
if ! modprobe -n -q 9p && [[ $(systemd-detect-virt) =~ ^(qemu|kvm)$ ]]; then
  step "installing a kernel with 9p"
  apt_install "linux-image-$(dpkg --print-architecture)"
  apt-get purge -y '?installed?name(^linux-image-.*cloud)'
fi

step "cleaning up"
apt-get clean
fstrim / || true  # gives the freed blocks back to the host's disk file

touch "$marker"
doing=
