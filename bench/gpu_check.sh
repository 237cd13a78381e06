#!/bin/bash
# Checks all claims about a real GPU on one machine with a GPU. Builds the programs, runs each claim with a time limit,
# continues after failures, and prints every figure. A claim without its requirements is skipped, and the last line
# has the names of failed and of skipped steps. Needs root and a C compiler, and no package registry. Variables, with
# their defaults:
#
#   FGPU          the command `fgpu`, for example "/tmp/python -m fgpu_ebpf.cli" (fgpu)
#   PYTHON        an interpreter with pynvml (python3)
#   TORCH_PYTHON  an interpreter with torch and jax (python3)
#   CUDARTS       folders with more versions of libcudart, separated by colons (none)
#   HEADERS       a folder with cuda.h, cudaTypedefs.h and nvml.h (build/headers, else the CUDA toolkit's)
#   DRIVER_ROOT   the folder below which the driver's libraries are (/)
#   CLAIMS        the names of claims of bench/gpu/check.py and of benchmarks (all)
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

export FGPU=${FGPU:-fgpu} DRIVER_ROOT=${DRIVER_ROOT:-/} TORCH_PYTHON=${TORCH_PYTHON:-python3}
python=${PYTHON:-python3}
headers=${HEADERS:-}
for folder in "$PWD/build/headers" /usr/local/cuda/include /usr/local/cuda/targets/x86_64-linux/include; do
    [ -n "$headers" ] || [ ! -e "$folder/cuda.h" ] || headers=$folder
done
failed=() skipped=()

step() { # step NAME SECONDS COMMAND...: runs a command with a time limit, and records a failure or exit status 77 (SKIP)
    local name=$1 seconds=$2 begun=$SECONDS status=0
    shift 2
    printf '\n== %s\n' "$name"
    timeout --kill-after=60 "$seconds" "$@" || status=$? # at its end a claim may start an agent again, to detach it
    case $status in
    0) printf 'PASS step %s (%d s)\n' "$name" $((SECONDS - begun)) ;;
    77)
        printf 'SKIP step %s (%d s)\n' "$name" $((SECONDS - begun))
        skipped+=("$name")
        ;;
    *)
        printf 'FAIL step %s: exit status %d (%d s)\n' "$name" $status $((SECONDS - begun))
        failed+=("$name")
        ;;
    esac
}

compile() { # compile SOURCE PROGRAM: compiles SOURCE, unless PROGRAM is newer because bench/kit.sh has built it
    [ ! "$2" -nt "$1" ] || return 0
    mkdir -p "${2%/*}"
    gcc -std=gnu11 -O2 -g -I"$headers" -o "$2" "$1" -ldl -pthread
}

step machine 30 sh -c 'uname -r; nvidia-smi -L; nvidia-smi --query-gpu=driver_version,memory.total --format=csv,noheader; gcc --version | head -n 1'
step shim 120 make -s -C shim OUT="$PWD/build/shim" HEADERS="$headers"
step oci 60 make -s -C oci OUT="$PWD/build/oci"
for name in client freed sandboxed bypass; do
    step $name 60 bash -c "$(declare -f compile); headers=$headers; compile tests/programs/$name.c build/e2e/$name"
done
for source in examples/fill.c bench/programs/*.c; do
    program=build/${source%%/*}/$(basename "$source" .c)
    step "${source##*/}" 60 bash -c "$(declare -f compile); headers=$headers; compile $source $program"
done
claims='start views runtimes fill torch jax pair race kills restarts orphan freed lookups hidden sandbox contexts deny parked sizes idle room full deadline entries'
benchmarks='memory calls storm load steady truth compute'
for claim in ${CLAIMS:-$claims $benchmarks}; do
    more=()
    [ "$claim" != compute ] || more=(--quick)
    case " $benchmarks " in
    *" $claim "*) step "$claim" 300 "$python" -m "bench.$claim" --driver-root "$DRIVER_ROOT" "${more[@]}" ;;
    *) step "$claim" 240 "$python" -m bench.gpu.check "$claim" ;;
    esac
done
printf '\n== end: %d failed: %s; ' "${#failed[@]}" "${failed[*]:-none}"
printf '%d skipped: %s\n' "${#skipped[@]}" "${skipped[*]:-none}"
[ ${#failed[@]} = 0 ]
