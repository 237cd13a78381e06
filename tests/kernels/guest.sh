#!/bin/bash
# What the guest does: its file systems, the suite, and the end.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
{ read -r checkout && read -r suite && read -r parts; } </run/out/what
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
mount -t tracefs tracefs /sys/kernel/tracing
mkdir -p /dev/pts /dev/shm "$checkout"
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -o bind "/run/host$checkout" "$checkout" # hidden where it lies below /tmp
ln -s /proc/self/fd /dev/fd
ip link set lo up
ulimit -n 65536
# What is probed lies in memory: programs and libraries that were built are few.
mount -t tmpfs tmpfs "$checkout/build"
for part in $parts; do cp -a "/run/host$checkout/build/$part" "$checkout/build/"; done
cd "$checkout" || exit
uname -r >/run/out/release
PYTHONDONTWRITEBYTECODE=1 FGPU_TEST_PROGRAMS=/run/out/programs FGPU_TEST_SCALE=quick \
    .venv/bin/python -m pytest -p no:cacheprovider -rA --junitxml=/tmp/report.xml "$suite" >/run/out/log 2>&1
echo $? >/run/out/code
cp /tmp/report.xml /run/out/report.xml
dmesg >/run/out/dmesg
sync
echo o >/proc/sysrq-trigger
sleep 60
