"""In which dtype of the activations MLX's CPU backend multiplies packed weights fastest: the table in `backend.widens`.

python benchmarks/dtypes.py    # half a minute; prints the table, and a verdict. Exits with 1 if float32 is not worth it
"""

import sys
import time
from collections.abc import Callable

import mlx.core as mx

DTYPES = (mx.bfloat16, mx.float16, mx.float32)
PACKED = {  # what is packed → how, and the dtype of its scales
    "4 bits, bfloat16 scales": ({"bits": 4, "group_size": 64}, mx.bfloat16),
    "8 bits, bfloat16 scales": ({"bits": 8, "group_size": 64}, mx.bfloat16),
    "4 bits, float16 scales": ({"bits": 4, "group_size": 64}, mx.float16),
    "4 bits, float32 scales": ({"bits": 4, "group_size": 64}, mx.float32),
    "mxfp4": ({"mode": "mxfp4", "bits": 4, "group_size": 32}, mx.bfloat16),
    "nvfp4": ({"mode": "nvfp4", "bits": 4, "group_size": 16}, mx.bfloat16),
    "mxfp8": ({"mode": "mxfp8", "bits": 8, "group_size": 32}, mx.bfloat16),
}


def milliseconds(product: Callable[[], mx.array], times: int = 5) -> float:
    """The processor time of a product at best: whatever else runs, it is about the same."""
    best = float("inf")
    for _ in range(times):
        start = time.process_time()
        mx.eval(product())
        best = min(best, time.process_time() - start)
    return best * 1000


def row(weight: mx.array, how: dict | None) -> list[float]:
    """A matrix of the 30B and one token, in each dtype of the activations."""
    packed = mx.quantize(weight, **how) if how else None
    mx.eval(packed or weight)
    times = []
    for dtype in DTYPES:
        x = mx.random.normal((1, weight.shape[1])).astype(dtype)
        mx.eval(x)
        if how is None:
            times.append(milliseconds(lambda x=x: x @ weight.T))
        else:
            times.append(milliseconds(lambda x=x: mx.quantized_matmul(x, *packed, transpose=True, **how)))
    return times


def main() -> int:
    mx.set_default_device(mx.cpu)
    floats = mx.random.normal((4096, 2048))
    print(f"MLX {mx.__version__}: 4096 x 2048, one token, ms of processor time\n")
    print(f"{'weights':24}" + "".join(f"{str(dtype).rpartition('.')[2]:>10}" for dtype in DTYPES))
    lost = []
    for name, (how, scales) in PACKED.items():
        times = row(floats.astype(scales), how)
        print(f"{name:24}" + "".join(f"{each:10.1f}" for each in times))
        own = times[DTYPES.index(scales)]  # in which the host computes unless told otherwise
        if scales != mx.float32 and times[2] > 0.8 * own:
            lost.append(name)
    for dtype in DTYPES[:2]:
        name = f"a matrix in {str(dtype).rpartition('.')[2]}"
        print(f"{name:24}" + "".join(f"{each:10.1f}" for each in row(floats.astype(dtype), None)))
    print(f"\nfloat32 does not win any more: {', '.join(lost)}. See backend.widens." if lost else "\nfloat32 wins")
    return bool(lost)


if __name__ == "__main__":
    sys.exit(main())
