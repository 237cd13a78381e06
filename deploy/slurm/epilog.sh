#!/bin/sh
# Slurm's Epilog on a node: removes a note of the prolog, and a job's cgroup that Slurm has not used or not removed. The
# limit ends with the cgroup, which has no process any more; a slurmstepd that has not exited yet is waited for.
rm -f "/run/fgpu-slurm/$SLURM_JOB_ID"
awk '$3 == "cgroup2" { print $2 }' /proc/mounts | while read -r mount; do
    # The job's cgroup has one of two names: see the prolog.
    for folder in "$mount"/system.slice/*slurmstepd.scope/"job_$SLURM_JOB_ID" \
        "$mount"/system.slice/*slurmstepd.scope/"${SLURM_JOB_SLUID:-job_$SLURM_JOB_ID}"; do
        tries=0
        while [ -d "$folder" ] && [ $tries -lt 10 ]; do
            [ $tries = 0 ] || sleep 0.2
            find "$folder" -depth -type d -exec rmdir {} \; 2>/dev/null || :
            tries=$((tries + 1))
        done
    done
done
