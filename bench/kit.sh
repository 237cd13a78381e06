#!/bin/sh
# Brings to a GPU host without a package registry all that the benchmarks and bench/gpu_check.sh need.
#
#   bench/kit.sh pack FOLDER      on Debian 12, with access to registries: fills FOLDER (55 MB)
#   bench/kit.sh unpack FOLDER    on the GPU host, as root, in this tree, with gcc and Python $PYTHON_VERSION (3.12):
#                                 builds a copy of the tree in /tmp/fgpu, and writes /tmp/fgpu/env, which a shell
#                                 sources before it runs a benchmark
#
# No file of the host is replaced: packages are unpacked below /tmp. A file fgpu.pth and a file in /etc/ld.so.conf.d add
# their folders to the search paths of the host's Python and linker, because the agent's loader and the gatekeeper ignore
# environment variables.
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
version=${PYTHON_VERSION:-3.12}

wheels() { # wheels FOLDER PACKAGE...: downloads packages for the GPU host's Python, with their dependencies
    folder=$1
    shift
    "$root/.venv/bin/python" -m pip download --quiet --disable-pip-version-check --dest "$folder" --only-binary=:all: \
        --python-version "$version" --platform manylinux2014_x86_64 --platform manylinux_2_28_x86_64 "$@"
}

pack() {
    "$root/dev" build
    rm -rf "$1"
    mkdir -p "$1/debs" "$1/bcc" "$1/wheels"
    (cd "$1/debs" && apt-get download -qq -o APT::Sandbox::User=root libbpfcc python3-bpfcc libllvm14 libclang-cpp14 \
        libbpf1 libedit2 libbsd0 libmd0 libxml2 libicu72 libtinfo6 libelf1 libz3-4 libdebuginfod1 libffi8)
    for deb in "$1"/debs/*.deb; do dpkg -x "$deb" "$1/bcc"; done
    # Of the packages, only the shared objects that BCC links and its Python package are needed.
    rm -r "$1/debs" "$1/bcc/usr/share"
    find "$1/bcc" -name 'libicui18n*' -delete -o -name 'libicuio*' -delete -o -name 'libicut*' -delete
    tar -C "$1/bcc" --use-compress-program 'xz -T0 --x86 --lzma2=dict=64MiB' -cf "$1/bcc.tar.xz" .
    rm -r "$1/bcc"
    "$root/.venv/bin/python" -c '
import sys, tomllib
print("\n".join(tomllib.load(open(sys.argv[1], "rb"))["project"]["dependencies"]))' "$root/pyproject.toml" >"$1/needed"
    grep -E '^(nvitop|nvidia-ml-py)==' "$root/tests/e2e/requirements.txt" >>"$1/needed"
    wheels "$1/wheels" --requirement "$1/needed" blessed
    "$root/.venv/bin/python" -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$1/wheels" \
        "$(grep '^gpustat==' "$root/tests/e2e/requirements.txt")"
    for runtime in nvidia-cuda-runtime-cu11==11.8.89 nvidia-cuda-runtime-cu12==12.9.79 nvidia-cuda-runtime==13.0.96; do
        wheels "$1/unpacked" --no-deps "$runtime"
        mkdir -p "$1/runtimes/$runtime"
        unzip -qjo "$1/unpacked/"*.whl '*/libcudart.so*' -d "$1/runtimes/$runtime" # without the files for building programs
        rm -r "$1/unpacked"
    done
    tar -C "$root/build" -czf "$1/headers.tar.gz" headers
    tar -C "$1" --remove-files -czf "$1/runtimes.tar.gz" runtimes
    du -sh "$1"
}

bcc() { # bcc ARCHIVE: unpacks BCC with the shared objects that it needs, except those of libc
    mkdir -p /tmp/fgpu/bcc /tmp/fgpu/lib
    tar -C /tmp/fgpu/bcc -xf "$1"
    for name in bcc LLVM clang-cpp bpf edit z3 tinfo bsd md xml2 icuuc icudata elf ffi debuginfod; do
        find /tmp/fgpu/bcc -name "lib$name*.so*" -exec ln -sf -t /tmp/fgpu/lib {} +
    done
    site=$(/usr/bin/python3 -Ic 'import os, site; print(next(d for d in site.getsitepackages() if os.path.isdir(d)))')
    printf '%s\n' /tmp/fgpu/tree /tmp/fgpu/site /tmp/fgpu/bcc/usr/lib/python3/dist-packages >"$site/fgpu.pth"
    echo /tmp/fgpu/lib >/etc/ld.so.conf.d/zz-fgpu-bcc.conf
    ldconfig
    /usr/bin/python3 -I -W ignore -c 'import bcc; bcc.BPF' || { echo "kit.sh: /usr/bin/python3 cannot import BCC" >&2 && exit 1; }
}

command_of() { # command_of NAME ENVIRONMENT... PROGRAM...: writes a command that runs a program with this environment
    name=/tmp/fgpu/bin/$1
    shift
    printf '#!/bin/sh\nexec env %s "$@"\n' "$*" >"$name"
    chmod +x "$name"
}

unpack() {
    [ "$(id -u)" = 0 ] || { echo "kit.sh: unpack needs root" >&2 && exit 1; }
    rm -rf /tmp/fgpu
    mkdir -p /tmp/fgpu/tree /tmp/fgpu/bin /tmp/fgpu/site
    bcc "$1/bcc.tar.xz"
    for wheel in "$1"/wheels/*.whl; do python3 -m zipfile -e "$wheel" /tmp/fgpu/site; done
    for more in "$1"/*.tar.gz; do tar -C /tmp/fgpu -xzf "$more"; done
    tar -C "$root" --exclude=./.git --exclude=./.venv --exclude=./build -cf - . | tar -C /tmp/fgpu/tree --no-same-owner -xf -
    packages=/tmp/fgpu/bcc/usr/lib/python3/dist-packages
    command_of python LD_LIBRARY_PATH=/tmp/fgpu/lib "PYTHONPATH=/tmp/fgpu/tree:/tmp/fgpu/site:$packages" /usr/bin/python3
    command_of fgpu-parker /tmp/fgpu/bin/python -m fgpu_ebpf.parker
    # These are programs of users. They run without BCC's libraries.
    command_of nvitop -u LD_LIBRARY_PATH PYTHONPATH=/tmp/fgpu/site /usr/bin/python3 -m nvitop
    command_of gpustat -u LD_LIBRARY_PATH PYTHONPATH=/tmp/fgpu/site /usr/bin/python3 -m gpustat
    # The packages of fgpu compile bytecode at their installation too. The host's environment may keep Python from writing it.
    /usr/bin/python3 -m compileall -q /tmp/fgpu/site /tmp/fgpu/tree/fgpu_ebpf
    build
    cat >/tmp/fgpu/env <<END
cd /tmp/fgpu/tree
export PATH=/tmp/fgpu/bin:\$PATH FGPU="/tmp/fgpu/bin/python -m fgpu_ebpf.cli" PYTHON=/tmp/fgpu/bin/python
export HEADERS=/tmp/fgpu/headers DRIVER_ROOT=/
export CUDARTS=$(find /tmp/fgpu/runtimes -mindepth 1 -type d | paste -sd:)
END
    for tracing in "tracefs /sys/kernel/tracing" "bpf /sys/fs/bpf"; do
        # shellcheck disable=SC2086 # two words: a file system type and a mount point
        set -- $tracing
        mountpoint -q "$2" || mount -t "$1" "$1" "$2"
    done
}

build() { # builds the shim, the OCI helper and the benchmarks' programs, as ./dev build does
    cd /tmp/fgpu/tree
    make -s -C shim OUT=/tmp/fgpu/tree/build/shim HEADERS=/tmp/fgpu/headers
    make -s -C oci OUT=/tmp/fgpu/tree/build/oci
    mkdir -p build/bench build/examples build/e2e
    ln -sfn /tmp/fgpu/headers build/headers
    for source in bench/programs/*.c examples/*.c; do
        program=build/${source%%/*}/$(basename "$source" .c)
        gcc -std=gnu11 -O2 -g -I/tmp/fgpu/headers -o "$program" "$source" -ldl -pthread
    done
    for program in client freed life sandboxed; do
        gcc -std=gnu11 -O2 -g -I/tmp/fgpu/headers -o build/e2e/$program tests/programs/$program.c -ldl -pthread
    done
}

[ $# = 2 ] || { echo "usage: bench/kit.sh pack|unpack FOLDER" >&2 && exit 2; }
case $1 in
pack) pack "$2" ;;
unpack) unpack "$(cd "$2" && pwd)" ;;
*) echo "kit.sh: no $1: pack or unpack" >&2 && exit 2 ;;
esac
