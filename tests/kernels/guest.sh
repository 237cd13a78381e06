#!/bin/bash
# The guest's work: it mounts file systems, runs one suite after another, and powers off.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
export PYTHONDONTWRITEBYTECODE=1 FGPU_TEST_PROGRAMS=/run/out/programs FGPU_TEST_SCALE=quick
{ read -r checkout && read -r parts; } </run/out/what
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
mount -t tracefs tracefs /sys/kernel/tracing
mkdir -p /dev/pts /dev/shm "$checkout"
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -o bind "/run/host$checkout" "$checkout" # the tmpfs at /tmp hides a checkout below it
ln -s /proc/self/fd /dev/fd
ip link set lo up
ulimit -n 65536
# Probed files are in memory. The built programs and libraries are few.
mount -t tmpfs tmpfs "$checkout/build"
for part in $parts; do cp -a "/run/host$checkout/build/$part" "$checkout/build/"; done
cd "$checkout" || exit
uname -r >/run/out/release
while IFS=$'\t' read -r name words; do
    IFS=$'\t' read -ra arguments <<<"$words"
    .venv/bin/python -m pytest -p no:cacheprovider -v -rA --junitxml=/tmp/report.xml "${arguments[@]}" \
        >"/run/out/$name.log" 2>&1 </dev/null
    cp /tmp/report.xml "/run/out/$name.xml"
done </run/out/suites
dmesg >/run/out/dmesg
sync
echo o >/proc/sysrq-trigger
sleep 60
