#!/usr/bin/env bash
# Builds libflash_entmax_cuda.so from src/cuda for compute capability 9.0. Needs nvcc 12.8 or newer and
# the CUTLASS headers. Fails on compiler messages that mean serialised tensor-core products, and on
# register spills.
#
#   CUTLASS=<include folder> bench/gpu/build.sh <output folder> [head sizes] [elements] [jobs]
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
out=${1:?output folder}
read -r -a sizes <<<"${2:-32 64 128}"
read -r -a elements <<<"${3:-__nv_bfloat16 __half}"
jobs=${4:-$(nproc)}
mkdir -p "$out"
flags="-std=c++20 -O3 -lineinfo -gencode=arch=compute_90a,code=sm_90a --expt-relaxed-constexpr"
flags+=" -Xcompiler -fPIC,-Wall,-Wextra,-Wno-unknown-pragmas"
flags+=" -I ${CUTLASS:?include folder of CUTLASS} -I $root/src/cuda -Xptxas -v"
{
  for source in backward_instance forward_instance; do
    for element in "${elements[@]}"; do
      for size in "${sizes[@]}"; do
        name="${source}_${element}_$size"
        echo "nvcc $flags -DFLASH_ENTMAX_ELEMENT=$element -DFLASH_ENTMAX_HEAD_DIM=$size" \
          "-c $root/src/cuda/$source.cu -o $out/$name.o > $out/$name.log 2>&1"
      done
    done
  done
  for source in plan tensor_map c_interface; do
    echo "nvcc $flags -c $root/src/cuda/$source.cu -o $out/$source.o > $out/$source.log 2>&1"
  done
} >"$out/jobs"
xargs -P "$jobs" -I{} bash -c "{}" <"$out/jobs" || {
  grep -h error "$out"/*.log | head -20
  exit 1
}
nvcc -shared -o "$out/libflash_entmax_cuda.so" "$out"/*.o \
  -gencode=arch=compute_90a,code=sm_90a
if grep -hE 'C75(08|10|14|15|17|18)' "$out"/*.log; then exit 1; fi
if grep -lE '[1-9][0-9]* bytes spill' "$out"/*.log; then
  echo "the kernels in the logs above spill registers" >&2
  exit 1
fi
