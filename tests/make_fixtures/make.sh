#!/bin/sh
# Make every fixture again. Each variable names the Python of one environment; see README.md.
set -eu
cd "$(dirname "$0")"
: "${T4:?Python with transformers 4.57.6}" "${T500:?5.0.0}" "${T510:?5.10.2}" "${T523:?5.23.0}"
: "${MLX_VLM:?Python with mlx-vlm 0.7.10}" "${MLX_LM:?Python with mlx-lm 0.32.2}"
"$T4" with_transformers4.py
for python in "$T500" "$T510" "$T523"; do "$python" with_transformers5.py; done
for python in "$T4" "$T523"; do "$python" text_alone.py; done
"$MLX_VLM" with_mlx_vlm.py
"$MLX_LM" with_mlx_lm.py
"$T4" golden_mlx.py
"$T523" check.py
