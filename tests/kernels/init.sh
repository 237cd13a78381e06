#!/bin/sh
# The guest's first process: this machine's root, read-only, below a layer in memory.
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
while read -r module; do insmod "/m/$module"; done </m/order
plan9=trans=virtio,version=9p2000.L,msize=524288
mount -t 9p -o "$plan9,cache=loose,ro" host /lower
mount -t tmpfs -o size=80% tmpfs /upper
mkdir /upper/changed /upper/work
mount -t overlay -o lowerdir=/lower,upperdir=/upper/changed,workdir=/upper/work root /root
for folder in proc sys dev; do mount -o move "/$folder" "/root/$folder"; done
for folder in run tmp var/lib/fgpu; do
    mkdir -p "/root/$folder"
    mount -t tmpfs tmpfs "/root/$folder"
done
mkdir /root/run/out /root/run/host
mount -o move /lower /root/run/host
mount -t 9p -o "$plan9" out /root/run/out
exec switch_root /root /bin/bash /run/out/guest.sh
