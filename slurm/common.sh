# shellcheck shell=bash
# How a job starts, supervises and restarts a run, shared by the templates, which source this file and call
#
#   train LAUNCHER CONFIG RUN [FLAG ...]   start or continue a training run with one rank per task
#   once COMMAND ...                       run one process
#   every_task COMMAND ...                 run one process per task, which goes on where it was when the job is requeued
#
# From the environment of sbatch: AKI_SITE, the site file (slurm/site.env); AKI_CONFIG and AKI_RUN, instead of the
# template's configuration and run folder; AKI_NODES, fewer nodes than the job has, the others being spares;
# AKI_REQUEUE=no, where a job must not requeue itself (slurm/chain.sh).
#
# A run is identified by its folder. RUN/DONE is the only sign of success: exit codes of srun say little, because it
# returns the highest of all ranks, and the ranks that it killed count too.
set -u -o pipefail   # no -e: failures are handled below

say() { echo "== $(date '+%F %T') $*"; }

die() {
  say "error: $*" >&2
  exit 2
}

# --- Settings -------------------------------------------------------------------------------------------------------

read_site() {
  local site=${AKI_SITE:-slurm/site.env}
  [ -r "$site" ] || die "there is no site file $site (AKI_SITE)"
  HOST_PYTHON='' SRUN_FLAGS=() PREFLIGHT=() PRETRAIN_FLAGS=() SFT_FLAGS=() GIVE_UP_AFTER=3
  set +u   # modules and activate scripts may use unset variables
  # shellcheck source=slurm/site.env
  source "$site"
  set -u
  HOST_PYTHON=${HOST_PYTHON:-$PYTHON}
  export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}   # a checkout works without being installed
}

# Names this job to Slurm's commands. In a job array SLURM_JOB_ID may be the id of the whole array (its last task has
# it): "scontrol requeue $SLURM_JOB_ID" would then requeue every task.
job_id() {
  if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then echo "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"; else echo "$SLURM_JOB_ID"; fi
}

export_settings() {
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}      # the other cores of a task decode images
  export TOKENIZERS_PARALLELISM=false               # its threads do not survive the loader's forks
  export HF_HUB_OFFLINE=1                           # a wrong path is an error at once, not a download that times out
  export PYTHONUNBUFFERED=1                         # the last output of a killed rank reaches its log
  export PYTHONFAULTHANDLER=1                       # a crash in C++ leaves the Python stack in the rank's log
  export NCCL_DEBUG=${NCCL_DEBUG:-WARN}             # one line per problem; INFO floods the logs
  # The flight recorder keeps the last collectives of each rank in a ring buffer and writes them to a file when one
  # times out, which shows the rank that did not join.
  export TORCH_FR_BUFFER_SIZE=2000
  export TORCH_NCCL_DUMP_ON_TIMEOUT=1
  export TORCH_FR_DUMP_TEMP_FILE=$logs/nccl_trace_rank_
}

# The rendezvous of one attempt. The port differs between jobs, and between attempts of one job, so that none finds
# the sockets of another that has just ended.
export_master() {
  MASTER_ADDR=$(head -n 1 <<< "$1")
  MASTER_PORT=$((20000 + (SLURM_JOB_ID * 7 + ${SLURM_RESTART_COUNT:-0}) % 12000))
  export MASTER_ADDR MASTER_PORT
}

# --- Steps: srun, and signals while it runs -------------------------------------------------------------------------

# The warning before the time limit is sent to this shell alone (--signal=B:). The ranks save and end; this shell stays.
pass_on() {
  stop_asked=yes
  say "$1: asking the ranks to save and stop"
  scancel --quiet --signal=USR1 "$(job_id)"   # sent to the steps, not to this shell
}

# Run srun in the background: bash handles signals only between commands, or while it waits.
step() {
  local pid code
  srun --kill-on-bad-exit=1 --wait=60 --unbuffered --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
    "${SRUN_FLAGS[@]}" "$@" &
  pid=$!
  # a signal ends "wait", not srun
  while wait "$pid"; code=$?; kill -0 "$pid" 2>/dev/null; do :; done
  return "$code"
}

# --- Pre-flight -----------------------------------------------------------------------------------------------------

# Sets ``nodes`` (one per line) and ``bad`` (separated by commas).
choose_nodes() {
  local report wanted code
  nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
  wanted=${AKI_NODES:-$SLURM_JOB_NUM_NODES}
  bad=''
  if [ ${#PREFLIGHT[@]} -gt 0 ]; then
    export_master "$nodes"
    step --output="$logs/preflight/rank_%t.out" "$PYTHON" tools/preflight.py check "$logs/preflight" \
      --per_node "$SLURM_NTASKS_PER_NODE" "${PREFLIGHT[@]}"
    code=$?
    [ -z "$stop_asked" ] || return 1
    report=$("$HOST_PYTHON" tools/preflight.py report "$logs/preflight" \
      --per_node "$SLURM_NTASKS_PER_NODE" --nodes "$nodes")
    say "pre-flight: $report"
    bad=$(sed -n 's/^bad node \([^:]*\):.*/\1/p' <<< "$report" | paste -s -d,)
    # all nodes: then a setting, or the disk of the run, is at fault
    [ "$(grep --count '^bad node ' <<< "$report")" -lt "$(wc -l <<< "$nodes")" ] || { bad='' nodes=''; return 1; }
    [ -n "$bad" ] || [ "$code" = 0 ] || { say "the pre-flight was ended, and no node is at fault"; return 1; }
    nodes=$(grep --invert-match --line-regexp --fixed-strings "${bad//,/$'\n'}" <<< "$nodes")
  fi
  nodes=$(head -n "$wanted" <<< "$nodes")
  [ -n "$nodes" ] && [ "$(wc -l <<< "$nodes")" -ge "$wanted" ]
}

# --- Restart --------------------------------------------------------------------------------------------------------

# Pending jobs of the same chain; in an array, those of the same index.
successors() {
  [ "$requeue" = no ] || return 0
  squeue --noheader --array --user="$(id -un)" --name="$SLURM_JOB_NAME" --states=PENDING --format=%i |
    grep "${SLURM_ARRAY_TASK_ID:+_${SLURM_ARRAY_TASK_ID}}\$"
}

cancel_successors() {
  local job
  for job in $(successors); do scancel --quiet "$job"; done
}

# Exclude the nodes in ``bad`` from the next attempt. Slurm changes the list of pending jobs only: requeue first.
exclude_bad_nodes() {
  local job before
  [ -n "$bad" ] || return 0
  for job in $( [ "$requeue" = no ] || job_id ) $(successors); do
    before=$(scontrol show job --oneliner "$job" | grep -o ' ExcNodeList=[^ ]*' | cut -d= -f2)
    [ "$before" = '(null)' ] && before=''
    scontrol update JobId="$job" ExcNodeList="${before:+$before,}$bad" && say "job $job will not get $bad"
  done
}

show_errors() {
  local rank0=$logs/rank_0.out
  if grep --quiet --no-messages '^error' "$logs"/rank_*.out; then
    grep --no-filename --after-context=2 '^error' "$logs"/rank_*.out | head -n 12
  elif [ -s "$rank0" ]; then
    echo "last lines of $rank0:"
    tail -n 12 "$rank0"
  fi
}

# A node may be down without Slurm knowing yet. A requeue now could assign that node again, and in Slurm 22.05 jobs
# with GPUs never start after that. When Slurm notices, it ends this job and requeues it without the node.
wait_if_a_node_died() {
  local seconds
  timeout 60 srun --overlap --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
    --cpus-per-task=1 --output=/dev/null true && return
  seconds=$(scontrol show config | sed -n 's/^SlurmdTimeout *= *\([0-9]*\).*/\1/p')
  say "a node does not answer; Slurm will notice within ${seconds:-300} s and requeue this job without it"
  trap 'exit 1' TERM
  sleep $((${seconds:-300} + 120)) &
  wait $!
}

start_again() {
  local state
  if [ "$requeue" = no ]; then
    exclude_bad_nodes
    if [ -n "$stopped" ]; then say "the next job of the chain resumes the run"; exit 0; fi
    exit 1
  fi
  [ -n "$stopped$bad" ] || wait_if_a_node_died
  # A job that was cancelled is COMPLETING by now; a requeue would start it again.
  state=$(squeue --noheader --jobs="$(job_id)" --format=%T)
  [ "$state" = RUNNING ] || { say "this job is $state: it does not requeue itself"; exit 1; }
  trap '' TERM USR1   # requeueing sends TERM to this shell, which is not finished yet
  scontrol requeue "$(job_id)" || die "Slurm does not requeue this job; submit it again, or use slurm/chain.sh"
  exclude_bad_nodes
  exit 0
}

# Decide whether to start the run again, and act on the decision.
end_attempt() {
  local answer code
  answer=$("$HOST_PYTHON" tools/attempt.py decide "$run" --attempt "$attempt" --give-up-after "$GIVE_UP_AFTER")
  code=$?
  say "${answer:-no decision: Slurm is ending this job}"
  stopped=''
  case $code in
    0 | 30) cancel_successors; exit 0 ;;
    10) [[ $answer != stopped:* ]] || stopped=yes ;;
    20) show_errors; cancel_successors; exit 1 ;;
    *) show_errors; exit 1 ;;
  esac
  [ -n "$stopped" ] || show_errors
  start_again
}

# --- Entry points ---------------------------------------------------------------------------------------------------

# Two jobs in one run folder would overwrite each other's files.
take_run() {
  local owner
  mkdir -p "$logs/preflight" || die "cannot write to $run"
  owner=$(cat "$run/slurm_job" 2>/dev/null)
  if [ -n "$owner" ] && [ "$owner" != "$(job_id)" ] &&
    [ -n "$(squeue --noheader --jobs="$owner" --states=RUNNING --format=%i 2>/dev/null)" ]; then
    die "job $owner is training $run"
  fi
  job_id > "$run/slurm_job"
}

refuse_flags() {
  local flag
  for flag in "$@"; do
    case $flag in
      --run.dir | --run.dir=*) die "use AKI_RUN=FOLDER sbatch ... instead of $flag: the batch script must know it too" ;;
      --config | --config=*) die "use AKI_CONFIG=FILE sbatch ... instead of $flag" ;;
    esac
  done
}

may_change() {
  case " $* " in
    *" --allow_change"[\ =]* | *" --allow-change"[\ =]*) return 0 ;;
  esac
  return 1
}

train() {
  local launcher=$1 config=${AKI_CONFIG:-$2} answer count
  run=${AKI_RUN:-$3} attempt=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0} requeue=${AKI_REQUEUE:-yes} stop_asked='' bad=''
  logs=$run/logs/$attempt
  shift 3
  refuse_flags "$@"
  say "run $run, attempt $attempt, nodes $SLURM_JOB_NODELIST, logs of its ranks in $logs"
  if [ -e "$run/DONE" ] && ! may_change "$@"; then  # a run that is done may go on, which the launcher decides
    say "the run is done"
    cancel_successors
    exit 0
  fi
  take_run
  export_settings
  trap 'pass_on USR1' USR1
  trap 'say TERM' TERM   # the ranks get their own SIGTERM; this shell waits for them
  answer=$("$HOST_PYTHON" tools/attempt.py begin "$run" --attempt "$attempt")
  case $? in
    0) say "$answer" ;;
    2) exit 2 ;;   # it has said why
    30) say "$answer"; cancel_successors; exit 0 ;;
    *) die "$HOST_PYTHON tools/attempt.py does not work here (HOST_PYTHON in the site file)" ;;
  esac
  if choose_nodes; then
    export_master "$nodes"
    count=$(wc -l <<< "$nodes")
    step --nodes="$count" --ntasks=$((count * SLURM_NTASKS_PER_NODE)) --nodelist="${nodes//$'\n'/,}" \
      --output="$logs/rank_%t.out" "$PYTHON" "$launcher" --config "$config" --run.dir "$run" "$@"
    say "the ranks have ended"
  fi
  end_attempt
}

once() {
  srun --ntasks=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "${SRUN_FLAGS[@]}" "$@"
}

every_task() {
  logs=slurm/logs stop_asked=''
  export_settings
  if [ "${AKI_REQUEUE:-yes}" != no ]; then
    trap 'stop_asked=yes; say "USR1: ending the processes"; scancel --quiet --signal=TERM "$(job_id)"' USR1
  fi
  step "$@"
  code=$?
  [ -n "$stop_asked" ] && [ "$code" != 0 ] || exit "$code"
  trap '' TERM USR1   # requeueing sends TERM to this shell, which is not finished yet
  scontrol requeue "$(job_id)" || die "Slurm does not requeue this job; submit it again"
  exit 0
}

read_site
