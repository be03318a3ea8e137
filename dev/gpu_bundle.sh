#!/bin/sh
# dev/gpu_bundle.sh [--prebuilt]: collects into build/gpu-deps.tar.xz what a GPU machine without packages lacks: the
# headers and shared libraries that the program, its tests and the harness need. Run it where `make test` works; carry
# the file along and give it to dev/gpu_check.sh --deps. With --prebuilt the programs themselves are built here by nvcc
# and put in too, for any x86-64 processor with AVX2 (oneDNN picks wider instructions by itself), so that the GPU
# machine compiles nothing. OpenMPI comes along, to be started as gpu-deps/mpi/bin/mpirun. cuBLASLt and NCCL (220 MiB) do
# not: the programs open libcublasLt.so.13, and libnccl.so.2 for several GPUs, where CUDA or packages of Python have them.
set -eu
cd "$(dirname "$0")/.."
prebuilt=
case ${1-} in
  '') ;;
  --prebuilt) prebuilt=1 ;;
  *) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac

dev/install.sh libdnnl-dev liblapack-dev libopenblas0-openmp libcli11-dev libfmt-dev nlohmann-json3-dev libgtest-dev libbenchmark-dev libopenmpi-dev \
  openmpi-bin
deps=build/gpu-deps
rm -rf "$deps" "$deps.tar.xz"
mkdir -p "$deps/include" "$deps/lib"

for header in oneapi CLI fmt nlohmann gtest benchmark; do
  cp -rL "/usr/include/$header" "$deps/include/"
done
cp -L /usr/include/dnnl*.h /usr/include/dnnl*.hpp "$deps/include/"

# needs FILE...: copies every library that these need, beyond a compiler's own.
needs() {
  ldd "$@" | awk '$2 == "=>" && $3 ~ /^\// { print $1, $3 }' | sort -u | while read -r name path; do
    case $name in
      libc.* | libm.* | libstdc++.* | libgcc_s.* | libgomp.* | libpthread.* | libdl.*) ;;
      *) cp -L "$path" "$deps/lib/$name" ;;
    esac
  done
}

# library NAME: the shared object behind -lNAME, under the name that programs ask for, with the link that the linker
# wants and with everything it needs; a static library where there is nothing else.
library() {
  file=/usr/lib/x86_64-linux-gnu/lib$1
  if [ -e "$file.so" ]; then
    soname=$(objdump -p "$file.so" | sed -n 's/^ *SONAME *//p')
    cp -L "$file.so" "$deps/lib/$soname"
    [ "$soname" = "lib$1.so" ] || ln -sf "$soname" "$deps/lib/lib$1.so"
    needs "$file.so"
  elif [ -e "$file.a" ]; then
    cp -L "$file.a" "$deps/lib/"
  else
    echo "dev/gpu_bundle.sh: error: no library $1, -l$1, install its package" >&2
    exit 1
  fi
}
for name in dnnl lapack blas fmt gtest gtest_main benchmark; do library "$name"; done

# OpenMPI finds its plugins below OPAL_PREFIX, in the folders that it was configured with. Plugins for networks that
# one machine has no use for stay behind, with their libraries.
openmpi() {
  mpi=$deps/mpi
  plugins=$(ompi_info --parsable --path pkglibdir | sed -n 's/^path:pkglibdir://p')
  words=$(ompi_info --parsable --path pkgdatadir | sed -n 's/^path:pkgdatadir://p')
  mkdir -p "$mpi/bin" "$mpi/${plugins#/usr/}" "$mpi/${words#/usr/}"
  cp "$words"/*.txt "$mpi/${words#/usr/}/"
  for plugin in "$plugins"/mca_*.so; do
    ldd "$plugin" | grep -qE 'libfabric|libuc[pstm]\.|ibverbs|libpsm|mca_common_(ofi|ucx|verbs)|oshmem|not found' ||
      cp "$plugin" "$mpi/${plugins#/usr/}/"
  done
  for program in orterun orted; do cp -L "/usr/bin/$program" "$mpi/bin/"; done
  needs "$mpi"/bin/* "$mpi/${plugins#/usr/}"/*.so
  cat >"$mpi/bin/mpirun" <<'END'
#!/bin/sh
# OpenMPI of this folder, wherever it lies.
here=$(cd "$(dirname "$0")/.." && pwd)
export OPAL_PREFIX="$here" PATH="$here/bin:$PATH"
export PMIX_MCA_pcompress_base_silence_warning=1 # PMIx has stayed without its plugins: they only compress
export LD_LIBRARY_PATH="$here/../lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
exec "$here/bin/orterun" "$@"
END
  chmod +x "$mpi/bin/mpirun"
}
library mpi
openmpi

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
