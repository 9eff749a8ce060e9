#!/bin/sh
# Make every adapter again. Each variable names the Python of one environment; see README.md.
set -eu
cd "$(dirname "$0")"
: "${T5:?}" "${T5_018:?}" "${T4_017:?}" "${T4_018:?}" "${T4_019:?}" "${MLX_LM:?}"
export PYTHONHASHSEED=0  # PEFT writes sets
for python in "$T5" "$T5_018" "$T4_017" "$T4_018" "$T4_019"; do "$python" with_peft.py; done
"$MLX_LM" with_mlx_lm.py
"$T5" golden_of_mlx.py
"$T4_018" golden_of_mlx.py
"$T5" train_with_peft.py
