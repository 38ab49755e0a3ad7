#!/bin/sh
# Train on several machines: run this on each of them, with its own NODE_RANK, within a few minutes.
#
#   node A:  NODE_RANK=0 HEAD=nodeA:29400 launch/torchrun-multinode.sh configs/quickstart.yaml
#   node B:  NODE_RANK=1 HEAD=nodeA:29400 launch/torchrun-multinode.sh configs/quickstart.yaml
#
# What the machines must share: this checkout (same commit), the run directory (a shared file
# system), and a network on which the nodes reach each other, HEAD's port included. Further
# arguments are overrides: engine.layout=hsdp8.zero3 run_dir=/shared/runs/big
set -eu

NODES=${NODES:-2}                      # how many machines
NODE_RANK=${NODE_RANK:?0 on the first machine, 1 on the second, ...}
HEAD=${HEAD:?host:port of the first machine, as the others reach it}
PROCS=${PROCS:-auto}                   # ranks on this machine; auto: one for each GPU or core
RUN_ID=${RUN_ID:-shardwise}            # tells apart runs that use the same HEAD
INTERFACE=${INTERFACE:-}               # network interface, e.g. eth0; empty: the host name's
LOCAL_ADDR=${LOCAL_ADDR:-}             # this machine's address, if its host name is not enough
PYTHON=${PYTHON:-.venv/bin/python}
COMMAND=${COMMAND:-train}              # "doctor --cluster" looks at all machines before a run

if [ -n "$INTERFACE" ]; then
    export GLOO_SOCKET_IFNAME="$INTERFACE" NCCL_SOCKET_IFNAME="$INTERFACE"
fi
if [ "$NODE_RANK" -eq 0 ]; then is_head=true; else is_head=false; fi

# SIGUSR1, which schedulers send before the time is over, is passed on to the ranks too; they save
# and end. torchrun gives no rank's exit code on: exit.json in the run's folder says 85 (saved, to
# be started again) or another of README's table.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1

# A fresh rendezvous for each attempt: restarted ranks would connect to addresses of dead ones.
exec "$PYTHON" -m torch.distributed.run \
    --nnodes "$NODES" --node-rank "$NODE_RANK" --nproc-per-node "$PROCS" \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD" --rdzv-id "$RUN_ID" \
    --rdzv-conf "is_host=$is_head" ${LOCAL_ADDR:+--local-addr "$LOCAL_ADDR"} --max-restarts 0 \
    -m shardwise $COMMAND "$@"
