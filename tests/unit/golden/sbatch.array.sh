#!/bin/bash
#SBATCH --job-name=radeon-stack-s
#SBATCH --array=0-1
#SBATCH --output=/shared/home/runs/s/slurm/task-%a.txt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=6144M
#SBATCH --time=60
#SBATCH --chdir=/
#SBATCH --open-mode=append
#SBATCH --export=ALL
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
# 2 runs of 20260101-000000-train-llama, written by radeon-stack

runs=(/shared/home/runs/s-1 /shared/home/runs/s-2)
exec bash "${runs[SLURM_ARRAY_TASK_ID]}/slurm/job.sh" >>"${runs[SLURM_ARRAY_TASK_ID]}/log.txt" 2>&1
