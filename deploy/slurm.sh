#!/usr/bin/env bash
# One run as one Slurm job: Ray on every node of the allocation, token authentication on, `mmcot run` on the first.
#
#   MMCOT_ENV=/shared/mmcot/env sbatch --nodes=2 deploy/slurm.sh --preset demo \
#       --set run.dir=/shared/mmcot/runs/demo --set data.shards_dir=/shared/mmcot/shards/demo --set cluster.num_workers=2
#
# Arguments are those of `mmcot run`; folders must be absolute and on storage that every node mounts. Before its time is up,
# Slurm signals this script, the ranks write a checkpoint, and the job queues again and goes on. deploy/slurm.md has the rest.
#SBATCH --job-name=mmcot
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-task=1
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=mmcot-%j.log
set -euo pipefail

: "${MMCOT_ENV:?set MMCOT_ENV to the Python environment that has mmcot, on storage that every node mounts}"
: "${SLURM_JOB_NODELIST:?start this with sbatch}"
PORT=${MMCOT_RAY_PORT:-6379}

# Secrets and state of this job alone; the token is what a process needs to speak to this job's Ray.
state=$HOME/.mmcot/slurm-$SLURM_JOB_ID
(umask 077 && mkdir -p "$state")
rm -f "$state/pid" "$state/status"
(umask 077 && head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' > "$state/token")
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$state/token RAY_USAGE_STATS_ENABLED=0
export PATH=$MMCOT_ENV/bin:$PATH

# This script runs on the first node, and a node's own name may stand for its loopback.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
address=${MMCOT_HEAD_ADDRESS:-$(getent ahostsv4 "$first" | awk '$1 !~ /^127\./ { print $1; exit }' || true)}
address=${address:-$(hostname -I | awk '{ print $1 }')}
if [ -z "$address" ]; then
  echo "no IPv4 address of the first node, $first, was found; set MMCOT_HEAD_ADDRESS to the one that the other nodes reach" >&2
  exit 1
fi
# Ray gives nodes 30 seconds to find each other; an environment that all of them read from shared storage takes longer.
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=${RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT:-300}

# On the first node, where this script runs as well: its process id lets the trap below reach it, and its status is the
# job's (`ray symmetric-run` ends with 0 when Ray itself does not start).
# shellcheck disable=SC2016  # expanded by the inner shell
leader='
  state=$1; shift
  mmcot run "$@" --set cluster.address=auto & echo $! > "$state/pid"
  wait $! && status=0 || status=$?
  echo "$status" > "$state/status"; exit "$status"'

trap 'rm -rf "$state"' EXIT
asked=no
trap 'asked=yes; echo "asking the run for a checkpoint"; [ ! -s "$state/pid" ] || kill -TERM "$(cat "$state/pid")" || true' TERM

# --cpus-per-task again: since 22.05 srun no longer takes it from the job.
srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=0 \
  ray symmetric-run --address "$address:$PORT" --min-nodes "$SLURM_JOB_NUM_NODES" \
  --num-cpus "${SLURM_CPUS_PER_TASK:-1}" --disable-usage-stats -- bash -c "$leader" leader "$state" "$@" &
step=$!
until wait "$step" || ! kill -0 "$step" 2> /dev/null; do :; done # a signal ends a wait, not the step

status=$(cat "$state/status" 2> /dev/null || echo 1)
if [ ! -e "$state/status" ]; then echo "the run did not end by itself: Ray did not start on every node (above), or the job was cancelled" >&2; fi
if [ "$status" = 143 ] && [ "$asked" = yes ]; then # not of a job that was cancelled
  echo "stopped with a checkpoint; queueing again to go on"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
