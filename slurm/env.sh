# The one place where a site says how its jobs find Python, and what every rank's
# environment holds. Sourced by every .sbatch, on the node that runs the batch script.

# --- the site's part: modules, a virtual environment, or a container ----------------------
# module purge; module load cuda/12.4 nccl
#
# A container instead of a virtual environment:
# CHAINRULE=(apptainer exec --nv /shared/images/chainrule.sif chainrule)
if [[ -z "${CHAINRULE[*]:-}" ]]; then
  if [[ -x "$CHAINRULE_HOME/.venv/bin/chainrule" ]]; then
    CHAINRULE=("$CHAINRULE_HOME/.venv/bin/chainrule")
  else
    CHAINRULE=(chainrule) # on the PATH
  fi
fi

# --- the same everywhere ------------------------------------------------------------------
export PYTHONSAFEPATH=1 # a folder of the checkout never shadows an installed package
export PYTHONUNBUFFERED=1
export PYTHONFAULTHANDLER=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
export TOKENIZERS_PARALLELISM=false
export MLFLOW_DISABLE_TELEMETRY=true
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$CHAINRULE_HOME/build/torch_extensions}"
# A rank that dies must not leave the others waiting in a collective for ever.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# export NCCL_SOCKET_IFNAME=ib0 # the site's fast network, where NCCL picks the wrong one
if [[ -n "${CHAINRULE_SCRATCH:-}" ]]; then
  export TMPDIR="$CHAINRULE_SCRATCH/$SLURM_JOB_ID"
  mkdir -p "$TMPDIR"
fi
