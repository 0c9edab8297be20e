#!/usr/bin/env bash
# A temporary Slurm cluster on this machine, on loopback only: munged, slurmctld and some slurmd, each "node" with
# simulated GPUs. No root, no systemd, no file outside its folder (Debian: apt-get install slurm-wlm munge).
#
#   slurm/cluster.sh up DIR [NODES=2] [GPUS=8]     start it afresh; prints how to use it
#   slurm/cluster.sh down DIR                      stop it and every process of its jobs
#   slurm/cluster.sh start-node DIR NODE           start a slurmd that died
#   slurm/cluster.sh processes DIR                 ids of all its processes, those of its jobs included
set -euo pipefail
PATH=$PATH:/usr/sbin   # slurmctld, slurmd and munged live there; ordinary users do not always have it

CPUS=128               # simulated CPUs of each node: 8 tasks of 16
MEMORY_MB=1000000

usage() { sed -n '2,/^set/p' "$0" | sed -n 's/^# \{0,1\}//p' >&2; exit 2; }

# Node names are addresses of loopback, so that MASTER_ADDR=<name of the first node> works as on a real cluster.
node_name() { echo "127.0.0.$1"; }

# Ports of this folder's daemons: they differ from those of other clusters on the machine and of jobs (20000 and up).
first_port() { echo $((10000 + $(printf %s "$dir" | cksum | cut -d' ' -f1) % 9000)); }

write_config() {
  local port me i
  port=$(first_port)
  me=$(id -un)
  cat > "$dir/slurm.conf" <<CONF
ClusterName=throwaway
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$me
SlurmdUser=$me
AuthType=auth/munge
# a requeued job may start only once its credential has expired: seconds here, two minutes on most clusters
AuthInfo=socket=$dir/run/munge.sock,cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
TmpFS=$dir/tmp/%n
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd-%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd-%n.log
# no cgroups: they need root
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
# one line per job that ended, instead of sacct
JobCompType=jobcomp/filetxt
JobCompLoc=$dir/log/jobs.log
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
# believe the lines below about CPUs and memory, not this machine
SlurmdParameters=config_overrides
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
GresTypes=gpu
MpiDefault=none
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=20
KillWait=10
MinJobAge=3600
MessageTimeout=20
PropagateResourceLimits=NONE
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
CONF
  for i in $(seq "$nodes"); do
    echo "NodeName=$(node_name "$i") NodeHostname=localhost NodeAddr=127.0.0.1 Port=$((port + i)) CPUs=$CPUS" \
      "Boards=1 SocketsPerBoard=1 CoresPerSocket=$CPUS ThreadsPerCore=1 RealMemory=$MEMORY_MB Gres=gpu:a100:$gpus"
  done >> "$dir/slurm.conf"
  # jobs of the second partition preempt those of the first, which get two minutes to save their state
  cat >> "$dir/slurm.conf" <<CONF
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=120
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
CONF
  # Slurm ignores GPUs without character devices, and only checks their type: links to /dev/null suffice
  for i in $(seq 0 $((gpus - 1))); do ln -sf /dev/null "$dir/dev/gpu$i"; done
  echo "Name=gpu Type=a100 File=$dir/dev/gpu[0-$((gpus - 1))]" > "$dir/gres.conf"
}

# A site file (see slurm/site.env) for this cluster: CPU instead of GPUs, the checkout's .venv.
write_site() {
  cat > "$dir/site.env" <<SITE
PYTHON=$(dirname "$(dirname "$(realpath "$0")")")/.venv/bin/python
PREFLIGHT=(--device cpu --min_matmul_tflops 0 --min_all_reduce_gbps 0 --min_free_gb 0.1)
SRUN_FLAGS=()
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME=lo
SITE
}

start_node() {
  mkdir -p "$dir/tmp/$1" "$dir/spool/$1"
  slurmd -f "$dir/slurm.conf" -N "$1"
}

up() {
  local key i
  for i in slurmctld slurmd munged; do
    command -v "$i" >/dev/null || { echo "error: no $i here (Debian: apt-get install slurm-wlm munge)" >&2; exit 2; }
  done
  down
  rm -rf "${dir:?}"/{run,log,state,spool,dev,tmp}
  mkdir -p "$dir"/{run,log,state,spool,dev,tmp}
  chmod 755 "$dir" "$dir/run"   # munged insists that others can reach its socket
  write_config
  write_site
  key=$dir/munge.key
  (umask 077 && head -c 128 /dev/urandom > "$key")
  # --force: its folder may lie below /tmp, which anybody may write to
  munged --force --socket="$dir/run/munge.sock" --key-file="$key" --pid-file="$dir/run/munged.pid" \
    --log-file="$dir/log/munged.log" --seed-file="$dir/run/munge.seed" 2>/dev/null
  slurmctld -f "$SLURM_CONF"
  for i in $(seq "$nodes"); do start_node "$(node_name "$i")"; done
  for _ in $(seq 300); do
    [ "$(sinfo -h -N -p batch -t idle 2>/dev/null | wc -l)" = "$nodes" ] && break
    sleep 0.1
  done
  [ "$(sinfo -h -N -p batch -t idle | wc -l)" = "$nodes" ] || { echo "error: see $dir/log" >&2; exit 1; }
  echo "$nodes nodes with $gpus simulated GPUs each. To use them:"
  echo "  export SLURM_CONF=$SLURM_CONF AKI_SITE=$dir/site.env"
}

# Whether a process belongs to this cluster: by its environment, never by its name alone. A shell in which SLURM_CONF
# was exported does not.
is_ours() {
  local environment
  environment=$(tr '\0' '\n' 2>/dev/null < "/proc/$1/environ") || return 1
  grep -qxF "SLURM_CONF=$dir/slurm.conf" <<< "$environment" || return 1
  grep -q '^SLURM_JOB_ID=' <<< "$environment" || [ "$(cat "/proc/$1/comm" 2>/dev/null)" = slurmstepd ]
}

processes() {
  local process
  for process in $(daemons); do
    kill -0 "$process" 2>/dev/null && echo "$process"
  done
  for process in /proc/[0-9]*; do
    process=${process#/proc/}
    is_ours "$process" && echo "$process"
  done
  return 0
}

daemons() { cat "$dir"/run/slurmd-*.pid "$dir/run/slurmctld.pid" "$dir/run/munged.pid" 2>/dev/null || true; }

down() {
  local process left
  [ -d "$dir/run" ] || return 0
  if kill -0 "$(cat "$dir/run/slurmctld.pid" 2>/dev/null)" 2>/dev/null; then
    timeout 10 scancel --quiet --user="$(id -un)" 2>/dev/null || true
  fi
  for process in $(daemons); do kill "$process" 2>/dev/null || true; done
  for _ in $(seq 50); do
    left=$(processes)
    [ -n "$left" ] || break
    sleep 0.1
  done
  # processes that did not end when asked, and those a dead slurmd left behind
  for process in $left; do kill -KILL "$process" 2>/dev/null || true; done
  rm -f "$dir"/run/*.pid
}

[ $# -ge 2 ] || usage
dir=$(realpath -m "$2")
nodes=${3:-2}
gpus=${4:-8}
export SLURM_CONF=$dir/slurm.conf
case $1 in
  up) up ;;
  down) down ;;
  start-node) start_node "$3" ;;
  processes) processes ;;
  *) usage ;;
esac
