#!/usr/bin/env bash
# Installs the build and compiles examples/minimal.c against it, by find_package and by pkg-config.
#   install_test.sh BUILD SOURCE
set -euo pipefail
build=$1 source=$2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cmake --install "$build" --prefix "$work/prefix" >/dev/null
# The program runs from its prefix, where no loader looks, and wherever that is moved.
env -u LD_LIBRARY_PATH "$work/prefix/bin/vattn" --version >/dev/null
mv "$work/prefix" "$work/moved prefix"
env -u LD_LIBRARY_PATH "$work/moved prefix/bin/vattn" doctor >/dev/null
mv "$work/moved prefix" "$work/prefix"
mkdir "$work/user"
cat >"$work/user/CMakeLists.txt" <<END
cmake_minimum_required(VERSION 3.25)
project(user C)
find_package(vattn 0.1 REQUIRED)
add_executable(minimal $source/examples/minimal.c)
target_link_libraries(minimal vattn::vattn)
END
cmake -S "$work/user" -B "$work/user/build" -G Ninja -DCMAKE_PREFIX_PATH="$work/prefix" >/dev/null
cmake --build "$work/user/build" >/dev/null
"$work/user/build/minimal"
export PKG_CONFIG_PATH=$(dirname "$(find "$work/prefix" -name vattn.pc)")
cc -std=c99 -pedantic -Wall -Wextra -Werror "$source/examples/minimal.c" -o "$work/minimal" \
  $(pkg-config --cflags --libs vattn)
LD_LIBRARY_PATH=$(pkg-config --variable=libdir vattn) "$work/minimal" >/dev/null
if grep -rnE '#include [<"](absl|memory|runtime|kernels)/' "$work/prefix/include"; then
  echo "installed headers include what is not installed"; exit 1
fi
