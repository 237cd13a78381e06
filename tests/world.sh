#!/bin/sh
# CMD...: what a host has only one of is the command's own, whatever runs there: /run/fgpu, the simulated driver's
# socket, the pinned maps. usage: unshare --mount sh tests/world.sh CMD...
#
# All of /run is its own, and the rest of the host's is mounted into that: whoever removes a folder on which others
# have mounted something, as `fgpu detach` does with the host's /run/fgpu, takes that from all of them.
set -eu
mount --make-rprivate /
own=$(mktemp -d)
mount -t tmpfs -o mode=755 tmpfs "$own"
for entry in /run/*; do
    inside=$own/${entry##*/}
    case $entry in
    /run/fgpu | /run/fgpu-sim) continue ;;
    esac
    if [ -h "$entry" ]; then
        cp -P "$entry" "$inside"
    elif [ -d "$entry" ]; then
        mkdir "$inside"
        mount --rbind "$entry" "$inside"
    elif [ -e "$entry" ]; then
        : >"$inside"
        mount --bind "$entry" "$inside"
    fi
done
mount --move "$own" /run
rmdir "$own"
mkdir /run/fgpu /run/fgpu-sim
mount -t tmpfs tmpfs /run/fgpu
mount -t tmpfs tmpfs /run/fgpu-sim
mount -t bpf bpf /sys/fs/bpf
exec "$@"
