#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Installs what the lab needs and the machine lacks, then says what it found:
# Go, QEMU, iproute2 and a distribution kernel for the guest. Debian and Ubuntu are
# served as root or with sudo; elsewhere the script names what is missing. It is
# quick and needs no network once everything is there.
#
# The guest's kernel is unpacked into $SG_CACHE (default: .cache beside this
# project), never installed: the machine's own boot loader is not touched.
set -euo pipefail

here=$(cd "$(dirname "$0")/.." && pwd)
cache=${SG_CACHE:-$here/.cache}
kernel_dir=$cache/kernel
stamp=$cache/qemu.newest      # the version that no source of this machine exceeds
qemu=qemu-system-x86_64
want_major=10                 # tested most; older ones from 7.2 on work too

started=$SECONDS
say()  { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: error: %s\n' "$*" >&2; exit 1; }
took() { say "$1 ($((SECONDS - $2)) s)"; }

have() { command -v "$1" >/dev/null 2>&1 || [ -x "/usr/sbin/$1" ] || [ -x "/sbin/$1" ]; }

qemu_version() { "$qemu" --version 2>/dev/null | sed -n '1s/.*version \([0-9.]*\).*/\1/p'; }

qemu_ok() {
  have "$qemu" || return 1
  local version; version=$(qemu_version)
  [ "${version%%.*}" -ge "$want_major" ] && return 0
  [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$version" ]
}

# From 1.21 on, go fetches the newer toolchain that go.mod asks for.
go_ok() {
  have go || return 1
  local version; version=$(go env GOVERSION 2>/dev/null)
  version=${version#go1.}; version=${version%%[!0-9]*}
  [ "${version:-0}" -ge 21 ]
}

missing() {
  go_ok || echo go
  qemu_ok || echo qemu
  have ip && have tc || echo iproute2
  have nsenter || echo util-linux
  [ -s "$kernel_dir/vmlinuz" ] || echo kernel
}

is_debian_like() {
  [ -r /etc/os-release ] && have apt-get && have dpkg-deb || return 1
  local ID='' ID_LIKE=''
  . /etc/os-release
  case " $ID $ID_LIKE " in *" debian "*|*" ubuntu "*) return 0 ;; esac
  return 1
}

name_what_is_missing() {
  local item
  echo "setup: this is not Debian or Ubuntu; please install by hand:" >&2
  for item in "$@"; do
    case $item in
      go)         echo "  - Go, 1.21 or newer (go.dev/doc/install)" ;;
      qemu)       echo "  - qemu-system-x86_64, version 7.2 or newer (10.x is tested most): your distribution's qemu-system-x86 or qemu-kvm package" ;;
      iproute2)   echo "  - ip and tc: the iproute2 (or iproute, iproute-tc) package" ;;
      util-linux) echo "  - nsenter: the util-linux package" ;;
      kernel)     echo "  - a Linux kernel image for the guest (x86-64, serial console and initramfs built in), copied to $kernel_dir/vmlinuz" ;;
    esac >&2
  done
  exit 1
}

as_root() {
  if [ "$(id -u)" -eq 0 ]; then "$@"
  elif have sudo; then sudo "$@"
  else fail "'$*' needs root, and there is no sudo: run this as root"; fi
}

updated=
update_lists() {
  [ -z "$updated" ] || return 0
  local t=$SECONDS
  say "refreshing the package lists"
  # One unreachable third-party source must not stop the rest.
  as_root apt-get update -qq || say "apt-get update reported errors; going on with the lists that are there"
  updated=1
  took "package lists are fresh" "$t"
}

# The keyring that the machine's own source for an archive names; nothing where
# the archive is trusted by way of /etc/apt/trusted.gpg.d.
keyring_of() {
  local uri=${1%/} f
  for f in /etc/apt/sources.list.d/*.sources; do
    [ -r "$f" ] || continue
    awk -v uri="$uri" 'BEGIN { RS = ""; FS = "\n" }
      index($0, uri) { for (i = 1; i <= NF; i++) if (sub(/^Signed-By: */, "", $i)) { print $i; exit } }' "$f"
  done | head -n 1
  cat /etc/apt/sources.list /etc/apt/sources.list.d/*.list 2>/dev/null | grep -F "$uri" |
    sed -n 's/^deb .*signed-by=\([^] ]*\).*/\1/p' | head -n 1
}

# Adds the release's backports beside the archive that the machine's own sources
# already name, with the same keyring, so that mirrors and snapshots are honoured.
add_backports() {
  local codename=$1 uri signed file
  apt-get indextargets --format '$(RELEASE)' 'Created-By: Packages' 2>/dev/null |
    grep -qx -- "$codename-backports" && return 0
  uri=$(apt-get indextargets --format '$(RELEASE)|$(COMPONENT)|$(REPO_URI)' 'Created-By: Packages' |
    awk -F'|' -v c="$codename" '$1 == c && $2 == "main" { print $3; exit }')
  [ -n "$uri" ] || return 1
  signed=$(keyring_of "$uri" | head -n 1)
  file=/etc/apt/sources.list.d/$codename-backports.sources
  say "adding $codename-backports from the archive this machine already uses"
  {
    printf 'Types: deb\nURIs: %s\nSuites: %s-backports\nComponents: main\n' "$uri" "$codename"
    [ -z "$signed" ] || printf 'Signed-By: %s\n' "$signed"
  } | as_root tee "$file" >/dev/null
  updated=; update_lists
  [ -n "$(candidate_major "$codename-backports")" ] || { as_root rm -f "$file"; return 1; }
}

candidate() { # version of package $1, optionally from target release $2
  apt-cache ${2:+-t "$2"} policy "$1" 2>/dev/null | sed -n 's/^ *Candidate: \([0-9]*:\)\{0,1\}//p'
}

candidate_major() { # of qemu-system-x86, optionally from a given target release
  candidate qemu-system-x86 "${1:-}" | sed 's/\..*//'
}

install_go() {
  local codename release=''
  codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
  if dpkg --compare-versions "$(candidate golang-go | sed 's/~.*//')" lt 1.21; then
    add_backports "$codename" || true
    release=$codename-backports
    dpkg --compare-versions "$(candidate golang-go "$release" | sed 's/~.*//')" ge 1.21 ||
      fail "this machine's sources have no Go from 1.21 on; see go.dev/doc/install"
  fi
  install_packages golang-go "$release"
  hash -r
}

install_qemu() {
  local codename release='' id
  codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
  id=$(. /etc/os-release && echo "$ID")
  if [ "$(candidate_major)" -lt "$want_major" ] 2>/dev/null && [ -n "$codename" ]; then
    [ "$id" != debian ] || add_backports "$codename" || true
    if [ "$(candidate_major "$codename-backports")" -ge "$want_major" ] 2>/dev/null; then
      release=$codename-backports
    fi
  fi
  install_packages qemu-system-x86 "$release"
  hash -r
  qemu_version >"$stamp"
}

install_packages() { # package $1, optionally from target release $2
  local t=$SECONDS
  say "installing $1${2:+ from $2}"
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends ${2:+-t "$2"} "$1" \
    >"$cache/apt.log" 2>&1 ||
    { tail -n 20 "$cache/apt.log" >&2; fail "installing $1 did not work; the whole log is in $cache/apt.log"; }
  took "$1 is installed" "$t"
}

# The flavour packages hold nothing but a dependency on the kernel itself.
kernel_package() {
  local flavour found
  for flavour in linux-image-cloud-amd64 linux-image-kvm linux-image-virtual linux-image-generic linux-image-amd64; do
    found=$(apt-cache depends --no-recommends --no-suggests "$flavour" 2>/dev/null |
      sed -n 's/^ *Depends: \(linux-image-[0-9][^ ]*\).*/\1/p' | head -n 1)
    [ -z "$found" ] || { echo "$found"; return; }
  done
  return 1
}

unpack_kernel() {
  local t=$SECONDS package work image
  package=$(kernel_package) || { update_lists; package=$(kernel_package); } ||
    fail "no kernel package found in this machine's sources; copy an x86-64 kernel to $kernel_dir/vmlinuz"
  say "fetching $package for the guest (unpacked, not installed)"
  work=$(mktemp -d)
  (cd "$work" && apt-get download -qq "$package") 2>"$cache/apt.log" ||
    { cat "$cache/apt.log" >&2; rm -rf "$work"; fail "downloading $package did not work"; }
  dpkg-deb --fsys-tarfile "$work"/*.deb | tar -x -C "$work" --wildcards './boot/*'
  image=$(find "$work/boot" -name 'vmlinuz-*' | head -n 1)
  [ -n "$image" ] || { rm -rf "$work"; fail "$package holds no boot/vmlinuz-*"; }
  mkdir -p "$kernel_dir"
  echo "${package#linux-image-}" >"$kernel_dir/version"
  cp "$image" "$kernel_dir/vmlinuz.new"
  chmod 0644 "$kernel_dir/vmlinuz.new"
  mv "$kernel_dir/vmlinuz.new" "$kernel_dir/vmlinuz"
  rm -rf "$work"
  took "guest kernel $(cat "$kernel_dir/version") is in $kernel_dir" "$t"
}

main() {
  local todo item
  mkdir -p "$cache"
  mapfile -t todo < <(missing)
  if [ ${#todo[@]} -gt 0 ]; then
    is_debian_like || name_what_is_missing "${todo[@]}"
    say "missing: ${todo[*]}"
    update_lists
    for item in "${todo[@]}"; do
      case $item in
        go)     install_go ;;
        qemu)   install_qemu ;;
        kernel) unpack_kernel ;;
        *)      install_packages "$item" ;;
      esac
    done
  fi
  say "QEMU $(qemu_version), guest kernel $(cat "$kernel_dir/version" 2>/dev/null || echo given by hand); took $((SECONDS - started)) s"
}

main "$@"
