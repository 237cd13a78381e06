#!/bin/sh
# Fetches NVIDIA's public headers into the folder DEST: cuda.h, cudaTypedefs.h, cudaEGLTypedefs.h and nvml.h. Builds need them. They
# are never committed.
set -eu

dest=${1:?usage: headers.sh DEST}
cuda=nvidia-cuda-runtime==13.0.96
nvml=nvidia-nvml-dev-cu12==12.9.79
python=${PYTHON:-python3}

[ -e "$dest/cuda.h" ] && [ -e "$dest/cudaTypedefs.h" ] && [ -e "$dest/nvml.h" ] && exit 0

mkdir -p "$dest"
# The packages are unpacked inside DEST, so that the renames below stay on one file system.
work=$(mktemp -d "$dest/.fetch.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM
"$python" -m pip install --quiet --disable-pip-version-check --root-user-action=ignore \
    --no-deps --target "$work" "$cuda" "$nvml"

# Each header is renamed into place, so that no build reads a part of it. cuda.h comes last: the Makefile waits for it.
for name in nvml.h cudaEGLTypedefs.h cudaTypedefs.h cuda.h; do
    found=$(find "$work" -name "$name" -path '*/include/*' | head -n 1)
    if [ -z "$found" ]; then
        echo "headers.sh: no $name in $cuda, $nvml" >&2
        exit 1
    fi
    mv "$found" "$dest/$name"
done
