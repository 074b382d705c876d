#!/usr/bin/env bash
# Four machines of eight GPUs under Slurm; one launcher a machine, and every run can be cut: --resume goes on.
#   sbatch recipes/launch/slurm.sh meta-llama/Llama-3.1-8B out/llama-3.1-8b recipes/llama-3.1-8b.args
#SBATCH --job-name=anyorder
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=INT@300
set -euo pipefail
MODEL=$1 OUTPUT=$2 ARGUMENTS=$3
export MASTER=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
RESUME=$(test -f "$OUTPUT/run.json" && echo --resume || true)
export MODEL OUTPUT ARGUMENTS RESUME
srun bash -c 'accelerate launch --config_file recipes/launch/fsdp2.yaml \
  --num_machines "$SLURM_NNODES" --num_processes $((SLURM_NNODES * 8)) --machine_rank "$SLURM_NODEID" \
  --main_process_ip "$MASTER" --main_process_port 29500 \
  -m anyorder adapt "$MODEL" "$OUTPUT" "@$ARGUMENTS" $RESUME'
