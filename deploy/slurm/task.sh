#!/bin/sh
# Slurm's TaskProlog: Slurm sets the variables that it prints, in each task. The variable gives a program the shim, before
# the libraries that the job preloads. In a task of a batch script the variable may have the shim already.
shim=/var/lib/fgpu/shim/current/libfgpu.so
case ":${LD_PRELOAD:-}:" in
::) echo "export LD_PRELOAD=$shim" ;;
*[:\ ]"$shim"[:\ ]*) ;;
*) printf 'export LD_PRELOAD=%s\n' "$shim:$LD_PRELOAD" ;;
esac
# A note of the prolog about the job's comment: once in the output, also of a batch script that calls srun.
note=/run/fgpu-slurm/$SLURM_JOB_ID
case ${ENVIRONMENT:-}/${SLURM_STEP_ID:-batch}/${SLURM_PROCID:-0} in
BATCH/batch/0 | /0/0) [ ! -r "$note" ] || sed 's/^/print /' "$note" ;;
esac
