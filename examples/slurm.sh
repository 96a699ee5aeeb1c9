#!/usr/bin/env bash
# One SAE on several machines of a Slurm cluster, a task for each machine. From the clone's root:
#
#   sbatch examples/slurm.sh @presets/llama3-8b.args --train_batch_size_tokens 8192 --store_batch_size_prompts 64
#
# The clone, --checkpoint_path and the Hugging Face cache lie on a disk that all machines share. A job that Slurm
# requeues, or that runs out of its time and is submitted again, goes on from its last checkpoint: --resume.
#SBATCH --job-name=sae
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@300
#SBATCH --output=%x-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"

gpus=${SLURM_GPUS_ON_NODE:-8}
NNODES=$SLURM_NNODES
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
MAX_RESTARTS=3
export NNODES MASTER_ADDR MASTER_PORT MAX_RESTARTS

# Once, on one machine: the others would write to the same environment.
srun --nodes=1 --ntasks=1 bash -c 'source ./setup_environment.sh && set_up_environment requirements.txt requirements/embedded.txt'

# NODE_RANK is known to each task alone; --signal=TERM reaches each, which saves a checkpoint and ends.
ids=$(seq -s, 0 $((gpus - 1)))
# shellcheck disable=SC2016  # each task has its own SLURM_NODEID
srun --kill-on-bad-exit=1 bash -c 'NODE_RANK=$SLURM_NODEID exec ./run_simple.sh "$@"' run "$gpus" "$ids" "$@" --resume
