#!/bin/sh
#SBATCH --job-name=quickstart
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --partition=gpu
#SBATCH --time=1-00:00:00
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --output=/shared/shardwise-logs/%x-%j.log
#SBATCH --open-mode=append
#SBATCH --export=ALL
#SBATCH --requeue
#SBATCH --signal=USR1@300
# Rendered by `shardwise launch slurm`: 2 x 8 ranks, one torchrun agent a node.
set -eu
if [ -n "${SLURM_HET_SIZE:-}" ]; then
    echo "a heterogeneous job: ranks must find the same node everywhere; submit without ':'" >&2
    exit 2
fi
cd /shared/shardwise
export NCCL_SOCKET_IFNAME=ib0
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=40
module load enroot

run=/shared/runs/quickstart
set -- configs/quickstart.yaml engine.layout=auto stages.pretrain.engine.layout=auto stages.sft.engine.layout=auto stages.grpo.engine.layout=auto stages.pretrain.batch.global_batch=64 run_dir=/shared/runs/quickstart

# An attempt has a rendezvous of its own: restarted ranks would connect to addresses of dead ones.
restarts=${SLURM_RESTART_COUNT:-0}
SHARDWISE_ATTEMPT="slurm.$SLURM_JOB_ID.$restarts"
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((10000 + (SLURM_JOB_ID * 16 + restarts) % 20000))
export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
export SHARDWISE_RUN="$run" SHARDWISE_ATTEMPT

agents() {  # one on each node; every rank runs shardwise with these words
    srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --wait=40 '--container-image=nvcr.io#nvidia/pytorch:25.09-py3' --container-mounts=/shared:/shared,/data:/data:ro --container-workdir=/shared/shardwise python \
        -m torch.distributed.run --nnodes=2 --nproc-per-node=8 --max-restarts=0 \
        --rdzv-backend=c10d --rdzv-endpoint="$head:$port" --rdzv-id="$SHARDWISE_ATTEMPT.$1" \
        -m shardwise "$@"
}
code=0
{ agents doctor --cluster "$@" && agents train "$@"; } || code=$?

# torchrun passes no rank's exit code on; the run's folder says what happened. 85: once more.
verdict=0
srun --nodes=1 --ntasks=1 --overlap '--container-image=nvcr.io#nvidia/pytorch:25.09-py3' --container-mounts=/shared:/shared,/data:/data:ro --container-workdir=/shared/shardwise python -m shardwise launch decide "$run" --code "$code" || verdict=$?
if [ "$verdict" -eq 85 ]; then
    scontrol requeue "$SLURM_JOB_ID" || true  # a cluster with RequeueExit=85 needs no asking
fi
exit "$verdict"
