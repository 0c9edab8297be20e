#!/usr/bin/env bash
# Queue several jobs of one run in advance, for sites where a job must not requeue itself. Each resumes where the one
# before it stopped, however that ended; when the run is done or given up, the rest is cancelled.
#
#   slurm/chain.sh JOBS [OPTION OF SBATCH ...] TEMPLATE [FLAG OF THE LAUNCHER ...]
#   slurm/chain.sh 10 --nodes 4 slurm/pretrain_aki4b.sbatch
#
# Use one chain per array index: jobs of one array would wait for each other. AKI_CHAIN names the chain, to add to it.
set -euo pipefail

if ! [[ ${1:-} =~ ^[1-9][0-9]*$ ]] || [ $# -lt 2 ]; then
  sed -n '2,/^set/p' "$0" | sed -n 's/^# \{0,1\}//p' >&2
  exit 2
fi
jobs=$1
shift
chain=${AKI_CHAIN:-aki-$(date +%Y%m%d-%H%M%S)-$$}
export AKI_REQUEUE=no
for _ in $(seq "$jobs"); do
  # singleton: at most one job of this name and user runs at a time
  sbatch --parsable --job-name="$chain" --no-requeue --dependency=singleton "$@"
done
echo "chain $chain: $jobs jobs" >&2
