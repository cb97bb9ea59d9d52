#!/usr/bin/env bash
# Installs the Debian packages that building and testing need, if any is missing.
set -euo pipefail
packages=(g++ cmake ninja-build pkg-config git ca-certificates libtbb-dev libhwloc-dev libabsl-dev
  libhwy-dev libeigen3-dev libboost-dev nlohmann-json3-dev libcli11-dev libxxhash-dev liburing-dev libgtest-dev
  libbenchmark-dev python3 python3-venv clang-format doxygen)
missing=()
for package in "${packages[@]}"; do
  dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' || missing+=("$package")
done
[ ${#missing[@]} -eq 0 ] && exit 0
echo "installing ${missing[*]}" >&2
sudo=; [ "$(id -u)" -eq 0 ] || sudo=sudo
$sudo apt-get update -qq
DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
