#!/bin/sh
# Slurm's TaskProlog: Slurm sets the variables that it prints, in each task. The variable gives a program the shim.
echo export LD_PRELOAD=/var/lib/fgpu/shim/current/libfgpu.so
