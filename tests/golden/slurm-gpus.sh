#!/bin/bash
# Job tiny-3fa9c1 of Espalier: one Ray node on each Slurm node, the coordinator beside the first.
#SBATCH --job-name=espalier-tiny-3fa9c1
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --gpus-per-node=8
#SBATCH --mem=921600M
#SBATCH --partition=gpu
#SBATCH --account=lm-42
#SBATCH --qos=long
#SBATCH --time=1-12:00:00
#SBATCH --constraint=a100&ib
#SBATCH --chdir="/shared/anna's files"
#SBATCH --output=/shared/home/jobs/tiny-3fa9c1/logs/coordinator.log
#SBATCH --open-mode=append
#SBATCH --signal=B:USR2@300
#SBATCH --export=HOME,LANG,PATH,USER,AWS_PROFILE
#SBATCH --requeue
#SBATCH --exclusive

module load cuda/12.8 nccl
ulimit -l unlimited
set -u
export PYTHONPATH=/shared/espalier/code
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH=/shared/home/jobs/tiny-3fa9c1/cluster/token
export NCCL_SOCKET_IFNAME=ib0

# Ray's head is the first node.
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(scontrol --oneliner show node "$head" | grep -o ' NodeAddr=[^ ]*' | cut -d = -f 2)
port=$((20000 + SLURM_JOB_ID % 10000))
life=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
stop=/shared/home/jobs/tiny-3fa9c1/cluster/stop.$life

# USR2 comes before the time limit or a preemption: checkpoints are written, and the job queues again.
# TERM asks for the same, and the job ends.
requeue=no
trap 'requeue=yes; touch "$stop"' USR2
trap 'touch "$stop"' TERM

srun --export=ALL --cpus-per-task=32 --kill-on-bad-exit=0 \
    --container-image=/images/espalier.sqsh \
    --container-mounts=/shared:/shared,/etc/slurm:/etc/slurm:ro \
    /shared/espalier/bin/python -m launcher.ray_node /shared/home/jobs/tiny-3fa9c1 \
    --head "$head" --address "$address:$port" --nodes "$SLURM_JOB_NUM_NODES" \
    --cpus 32 --gpus 8 --module launcher.coordinator \
    --ray-dir "/tmp/esp-$life" --stop-file "$stop" &
step=$!
until wait "$step"; ! kill -0 "$step" 2> /dev/null; do :; done
wait "$step"
code=$?
rm -f "$stop" "$stop.done"

if [ "$requeue" = yes ]; then
    case $code in
        0|1|4) ;; # nothing is left to do, or another attempt does it
        *) scontrol requeue "$SLURM_JOB_ID" && sleep 60 ;;
    esac
fi
exit "$code"
