#!/usr/bin/env bash
# Installs the Debian packages that building and testing need, if any is missing, and those that tests are skipped without.
set -euo pipefail
needed=(g++ cmake ninja-build pkg-config git ca-certificates libtbb-dev libhwloc-dev libabsl-dev
  libhwy-dev libeigen3-dev libboost-dev nlohmann-json3-dev libcli11-dev libxxhash-dev liburing-dev libgtest-dev
  libbenchmark-dev python3 python3-venv)
wanted=(clang-format doxygen)
missing() {
  for package in "$@"; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' || echo "$package"
  done
}
sudo=; [ "$(id -u)" -eq 0 ] || sudo=sudo
install() {
  [ $# -eq 0 ] && return
  echo "installing $*" >&2
  $sudo apt-get update -qq &&
    DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}
mapfile -t packages < <(missing "${needed[@]}")
install "${packages[@]}"
mapfile -t packages < <(missing "${wanted[@]}")
install "${packages[@]}" || echo "without ${packages[*]} some tests are skipped" >&2
