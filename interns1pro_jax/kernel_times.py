"""How long Pallas kernels take over their roofline, by the schedules of the compiled kernels (docs/kernels.md).

The roofline is FLOPs over the peak or bytes over the bandwidth of HBM, whichever is longer. The played schedule (`train.timeline`) and the
plan (`footprint`) count with these factors.
"""

# Time of the grouped products over their roofline (docs/kernels.md, 65,536 rows).
KERNEL_TIME_OVER_BOUND = {"v5e": 1.1, "v5p": 1.062, "v6e": 1.114, "tpu7x": 1.139}
# Of attention (docs/kernels.md, rows of 4,096 tokens; v5e from the cycles of v5p): heads of 128 fill half of the matrix units of v6e and
# tpu7x, and scores pass through the vector units. Splash's gradients, of rows whose keys do not fit in vector memory, are an assumption.
ATTENTION_TIME_OVER_BOUND = {
    "splash_mha_fwd": {"v5e": 1.42, "v5p": 1.42, "v6e": 3.61, "tpu7x": 3.73},
    "attention_forward": {"v5e": 1.25, "v5p": 1.25, "v6e": 2.66, "tpu7x": 2.64},
    "attention_gradient": {"v5e": 1.12, "v5p": 1.12, "v6e": 2.30, "tpu7x": 2.31},
    "splash_mha_d": {"v5e": 1.6, "v5p": 1.6, "v6e": 2.8, "tpu7x": 2.8},
}
# Of the norm and rotary encoding of queries and keys, whose vector operations take longer than its bytes (docs/kernels.md); v5e from the
# cycles of v5p.
ROTARY_TIME_OVER_BOUND = {
    "norm_and_rotary_gradient": {"v5e": 1.04, "v5p": 1.52, "v6e": 1.13, "tpu7x": 2.02},
    "norm_and_rotary": {"v5e": 1.0, "v5p": 1.33, "v6e": 1.01, "tpu7x": 1.60},
}
