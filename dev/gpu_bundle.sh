#!/bin/sh
# dev/gpu_bundle.sh [--prebuilt]: collects into build/gpu-deps.tar.xz what a GPU machine without packages lacks: the
# headers and shared libraries that the program, its tests and the harness need. Run it where `make test` works; carry
# the file along and give it to dev/gpu_check.sh --deps. With --prebuilt the programs themselves are built here by nvcc
# and put in too, for any x86-64 processor with AVX2 (oneDNN picks wider instructions by itself), so that the GPU
# machine compiles nothing.
set -eu
cd "$(dirname "$0")/.."
prebuilt=
case ${1-} in
  '') ;;
  --prebuilt) prebuilt=1 ;;
  *) sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac

dev/install.sh libdnnl-dev liblapack-dev libcli11-dev libfmt-dev nlohmann-json3-dev libgtest-dev libbenchmark-dev
deps=build/gpu-deps
rm -rf "$deps" "$deps.tar.xz"
mkdir -p "$deps/include" "$deps/lib"

for header in oneapi CLI fmt nlohmann gtest benchmark; do
  cp -rL "/usr/include/$header" "$deps/include/"
done
cp -L /usr/include/dnnl*.h /usr/include/dnnl*.hpp "$deps/include/"

# library NAME: the shared object behind -lNAME, under the name that programs ask for, with the link that the linker
# wants and with everything it needs beyond a compiler's own libraries; a static library where there is nothing else.
library() {
  file=/usr/lib/x86_64-linux-gnu/lib$1
  if [ -e "$file.so" ]; then
    soname=$(objdump -p "$file.so" | sed -n 's/^ *SONAME *//p')
    cp -L "$file.so" "$deps/lib/$soname"
    [ "$soname" = "lib$1.so" ] || ln -sf "$soname" "$deps/lib/lib$1.so"
    ldd "$file.so" | awk '$2 == "=>" { print $1, $3 }' | while read -r name path; do
      case $name in
        libc.* | libm.* | libstdc++.* | libgcc_s.* | libgomp.* | libpthread.* | libdl.*) ;;
        *) cp -L "$path" "$deps/lib/$name" ;;
      esac
    done
  elif [ -e "$file.a" ]; then
    cp -L "$file.a" "$deps/lib/"
  else
    echo "dev/gpu_bundle.sh: error: no library $1, -l$1, install its package" >&2
    exit 1
  fi
}
for name in dnnl lapack blas fmt gtest gtest_main benchmark; do library "$name"; done

if [ -n "$prebuilt" ]; then
  build=build/gpu-portable
  ${MAKE:-make} -j"$(nproc)" DEVICE=cuda BUILD=$build OPT='-O2 -march=x86-64-v3' \
    $build/train_gpt $build/tests/all $build/harness $build/dev/bench
  for program in train_gpt tests/all harness dev/bench; do
    mkdir -p "$deps/bin/$(dirname $program)"
    objcopy --strip-debug "$build/$program" "$deps/bin/$program"
  done
fi

tar -C build -cf - gpu-deps | xz -T0 -3 >"$deps.tar.xz"
size=$(wc -c <"$deps.tar.xz")
echo "$deps.tar.xz: $((size >> 20)) MiB"
[ "$size" -lt $((50 << 20)) ] || { echo "dev/gpu_bundle.sh: error: larger than 50 MiB" >&2; exit 1; }
