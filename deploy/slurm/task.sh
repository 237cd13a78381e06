#!/bin/sh
# Slurm's TaskProlog: Slurm sets the variables that it prints, in each task. The variable gives a program the shim.
echo export LD_PRELOAD=/var/lib/fgpu/shim/current/libfgpu.so
# A note of the prolog about the job's comment: once in the output, also of a batch script that calls srun.
note=/run/fgpu-slurm/$SLURM_JOB_ID
case ${ENVIRONMENT:-}/${SLURM_STEP_ID:-batch}/${SLURM_PROCID:-0} in
BATCH/batch/0 | /0/0) [ ! -r "$note" ] || sed 's/^/print /' "$note" ;;
esac
