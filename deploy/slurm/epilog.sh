#!/bin/sh
# Slurm's Epilog on a node: removes a job's cgroup that the prolog made and that Slurm has not used. The limit ends with
# the cgroup.
awk '$3 == "cgroup2" { print $2 }' /proc/mounts | while read -r mount; do
    for name in "job_$SLURM_JOB_ID" ${SLURM_JOB_SLUID:+"$SLURM_JOB_SLUID"}; do
        rmdir "$mount"/system.slice/*slurmstepd.scope/"$name" 2>/dev/null || :
    done
done
