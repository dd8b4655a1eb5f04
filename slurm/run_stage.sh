# How a batch script runs one stage: one task a rank under srun, signals passed on, a requeue
# where the stage asks for one. Sourced by every .sbatch; `run_stage CONFIG STAGE [options]`.

CHAINRULE_HOME="${CHAINRULE_HOME:-$SLURM_SUBMIT_DIR}"
if [[ ! -f "$CHAINRULE_HOME/slurm/env.sh" ]]; then
  echo "error: no slurm/env.sh under $CHAINRULE_HOME; submit from the checkout, or set CHAINRULE_HOME" >&2
  exit 2
fi
source "$CHAINRULE_HOME/slurm/env.sh"

# srun starts one of these a rank. `exec`: the signal that srun passes on reaches Python.
readonly AS_RANK='export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID; exec "$@"'
readonly REQUEUE=75 # "state is saved, run me again"

field() { # what `scontrol show job` says of field $2 of job $1
  scontrol show job -o "$1" | tr ' ' '\n' | sed -n "s/^$2=//p" | head -n 1
}

newest() { # whether attempt $2 of job $1 is the one that Slurm runs now
  local restarts=""
  for _ in {1..60}; do # a controller that is being restarted answers in a while
    restarts="$(field "$1" Restarts)"
    if [[ -n "$restarts" ]]; then break; fi
    sleep 2
  done
  [[ "$restarts" == "$2" ]]
}

preempted() { # whether the attempt of job $1 that began at $2 is being preempted
  local at
  at="$(field "$1" PreemptTime)"
  [[ "$at" == *T* && ! "$at" < "$2" ]]
}

run_stage() {
  local id="$SLURM_JOB_ID" restart="${SLURM_RESTART_COUNT:-0}"
  if [[ -n "${SLURM_ARRAY_JOB_ID:-}" ]]; then
    # CHAINRULE_PARTS=8 sbatch --array=0-7 slurm/pretokenize.sbatch … ; the stage itself afterwards
    id="${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
    set -- "$@" --part "$((${CHAINRULE_PART_OFFSET:-0} + SLURM_ARRAY_TASK_ID))/$CHAINRULE_PARTS"
  fi
  # The rendezvous: the first node of the job, a port that only this job uses.
  MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
  MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
  export MASTER_ADDR MASTER_PORT
  export CHAINRULE_ATTEMPT="$id.$restart"
  # The log of all attempts, which tells the next one why this one ended.
  CHAINRULE_LOG="$(readlink "/proc/$$/fd/1" || true)"
  export CHAINRULE_LOG
  echo "=== job $id, attempt $restart on $SLURM_JOB_NODELIST at $(date -u +%FT%TZ): chainrule stage $*"

  # `srun … & wait`: with srun in the foreground a trap would run only after srun has ended.
  local terminated=no heard="" srun_pid="" code=0 began
  began="$(field "$id" StartTime || true)"
  # Never TERM to srun: it would KILL the ranks at once. USR1 is passed on to all of them.
  trap 'heard="time limit"; if [[ -n "$srun_pid" ]]; then kill -USR1 "$srun_pid" 2>/dev/null || true; fi' USR1
  trap 'terminated=yes' TERM
  srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --export=ALL bash -c "$AS_RANK" rank "${CHAINRULE[@]}" stage "$@" &
  srun_pid=$!
  # `wait` returns early for each trapped signal.
  while kill -0 "$srun_pid" 2>/dev/null; do wait "$srun_pid" || true; done
  wait "$srun_pid" || code=$?

  # 75: the ranks saved their state. Above 128: a rank was killed (by the kernel, by a person,
  # with its node): the last checkpoint is whole. Where this script itself heard TERM, the job
  # was cancelled (or its time ran out unheeded), and must not rise from the dead.
  # An attempt that Slurm has restarted elsewhere meanwhile has nothing left to ask for.
  if [[ ("$code" == "$REQUEUE" || "$code" -gt 128) && "$terminated" == no ]] && newest "$id" "$restart"; then
    if preempted "$id" "$began"; then heard="preemption"; fi
    echo "=== job $id: exit $code, requeued at $(date -u +%FT%TZ): ${heard:-exit}"
    scontrol requeue "$id"
    sleep 60 & wait # until the requeue ends this script: it must not end first, as finished
  fi
  echo "=== job $id: exit $code at $(date -u +%FT%TZ)"
  exit "$code"
}
