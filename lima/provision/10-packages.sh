#!/bin/bash
# Run by Lima in the guest, as root, at every boot; does its work once.
# Packages from Debian, and what applies to the whole system.
set -eux -o pipefail
marker=/var/lib/agent-vm/done/10-packages
[ ! -e "$marker" ] || exit 0
mkdir -p "${marker%/*}"
exec > >(tee -a /var/log/agent-vm-provision.log) 2>&1
: "${PARAM_minimal:=false}" "${PARAM_aptMirror:=}" "${PARAM_locale:=}"

step() { { set +x; } 2>/dev/null; echo "agent-vm: $1"; set -x; }
fail() { step "error: $1"; exit 1; }
note() { echo "$1" >> /var/lib/agent-vm/notes; }

export DEBIAN_FRONTEND=noninteractive

use_mirror() {
  local mirror=${1%/} security codename sources
  [[ $mirror =~ ^https?://[A-Za-z0-9._~:/@%+,=-]+$ ]] || fail "--apt-mirror is not an http(s) URL"
  # Mirrors keep the security suite beside the archive, as debian-security. When this one does not,
  # security updates still come from where the image has them: better slow than silently missing.
  codename=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)
  security=${mirror%/*}/debian-security
  if ! curl -fsSL --connect-timeout 10 --retry 1 -o /dev/null \
    "$security/dists/$codename-security/InRelease"; then
    security=
    note "Security updates from the image's own mirror: --apt-mirror has none."
  fi
  # The cloud image names mirror lists (mirror+file:/etc/apt/mirrors/debian.list), others name URLs.
  sources=()
  for file in /etc/apt/sources.list /etc/apt/sources.list.d/debian.sources; do
    [ ! -s "$file" ] || sources+=("$file")
  done
  local old='(https?|mirror\+file):/[^ ]*'
  sed -E -i "s#$old/debian(\.list|/)?( |\$)#$mirror\3#" "${sources[@]}"
  [ -z "$security" ] ||
    sed -E -i "s#$old/debian-security(\.list|/)?( |\$)#$security\3#" "${sources[@]}"
  grep -qF "$mirror" "${sources[@]}" || fail "no Debian mirror to replace in ${sources[*]}"
}

step "setting up apt"
cat > /etc/apt/apt.conf.d/90agent-vm <<'CONF'
Acquire::Retries "2";
Acquire::http::Timeout "15";
Acquire::https::Timeout "15";
DPkg::Lock::Timeout "300";
CONF
# No need to survive a power cut while installing: an unfinished base instance is built anew.
echo force-unsafe-io > /etc/dpkg/dpkg.cfg.d/agent-vm
# A disposable VM must not spend its first minutes, and apt's lock, on upgrades.
systemctl mask --now apt-daily.timer apt-daily-upgrade.timer
[ -z "$PARAM_aptMirror" ] || use_mirror "$PARAM_aptMirror"
for try in 1 2 3; do
  if apt-get update --error-on=any; then break; fi
  [ "$try" -lt 3 ] || note "Some package lists are missing: apt-get update failed three times."
  sleep 5
done

step "installing packages"
packages=(ca-certificates curl git jq)
if [ "$PARAM_minimal" != true ]; then
  packages+=(
    build-essential file less openssh-client procps iproute2 rsync sudo tzdata unzip wget
    python3 python3-pip python3-venv
    fd-find gh ripgrep
    kitty-terminfo locales ncurses-term
    chromium fonts-liberation xauth xvfb
  )
fi
apt-get install -y --no-install-recommends "${packages[@]}"
if [ "$PARAM_minimal" != true ]; then
  ln -sf /usr/bin/fdfind /usr/local/bin/fd  # Debian's name, because another package has fd
fi

# The value is the host's LANG, whatever that holds: only a whole line of Debian's list counts.
if grep -sqxF -e "$PARAM_locale UTF-8" /usr/share/i18n/SUPPORTED; then
  step "generating the locale"
  echo "$PARAM_locale UTF-8" > /etc/locale.gen
  locale-gen
fi

# The project belongs to the host's user id: git would call that "dubious ownership" and refuse.
git config --system --replace-all safe.directory '*'

touch "$marker"
