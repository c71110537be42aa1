"""Intern-S1-Pro in JAX: the scientific multimodal mixture-of-experts model, trained and served.

Where things are, and the question each place answers:

    config            the sizes of a model; the released config.json in and out; glossary of dimension letters
    families          which released models there are, and how their files name things
    sharding          mesh axes, the one table that maps dimensions to them, `make_mesh`
    ops/              pure functions
      attention         scaled dot products with segments and a cache
      fope              Fourier position encoding
      grouped_matmul    the products of the experts, one entry point
      permutation       the counting sort that brings rows to their experts and back
      losses            cross entropy without holding all logits
      router_losses     balancing and z-loss
      norm, quantization
    layers/           NNX modules of the decoder
      router            choice of experts, straight-through gradient, replay, statistics
      moe               `expert_parallel_mlp`: the all-gather of tokens, the products, the reduce-scatter
      attention         projections, q/k norm, rotary, key/value cache
      decoder           the block; `run_blocks` scans a stack of them
    models/           text, vision, internvit, time_series, and interns1pro, which joins them; `inputs` is what they read
    tokenizer/, data/ text to ids; documents to packed batches that are a function of their number
    checkpoint/       hf_import reads the released layout into sharded arrays; manager saves and restores training
    optim/, train/    optimizer and schedule; the step, the loop around it, the report
    infer/            sampling and generation

Imports point one way: ops <- layers <- models <- train | infer; data, tokenizer, checkpoint and optim stand beside them.
Nothing here reads flags, gin or the environment: `experiments/` does.

    import jax
    from interns1pro_jax.config import ModelConfig
    from interns1pro_jax.models.interns1pro import create_model
    from interns1pro_jax.sharding import make_mesh

    with jax.set_mesh(make_mesh(fsdp=64, expert=8)):
        model = create_model(ModelConfig())
"""
