"""Measurements. Each module is one; run it from the root of the repository.

    python -m benchmarks.step_time                # one optimizer step on CPU beside optax and torch
    python -m benchmarks.sharded_step [--gpu]     # the same on TPU slices or GPUs, compiled only
    python -m benchmarks.kimi_k2_step             # Algorithm 1 for all of Kimi K2, compiled only
    python -m benchmarks.tpu_train_step           # the training program on TPU slices, the same
    python -m benchmarks.optimizer_share          # the optimizer's share of a step, compiled only
    python -m benchmarks.tpu_kernel_cycles        # the kernel of symmetric products, compiled only
    python -m benchmarks.tpu_kernel_step          # optimizer steps with this kernel, compiled only
    python -m benchmarks.tpu_kernel               # the kernel on an attached TPU, timed
    python -m benchmarks.gpu_kernel               # settings of muon on an attached GPU, timed
    python -m benchmarks.max_logit_cost           # what the max logits cost beside attention
    python -m benchmarks.newton_schulz_accuracy   # every preset, method and dtype against float64
    python -m benchmarks.batched_vs_loop          # a batched Newton–Schulz call against a loop
    python -m benchmarks.mirrored_products        # symmetric products by blocks against plain ones
    python -m benchmarks.evidence                 # small trainings that test the papers' claims

Each writes `results/NAME.json` with its command, versions and date. Shared parts: `hlo` reads
the text of compiled programs, `compiled` their cost, `roofline` their roofline on GPUs,
`kernel_cycles` the bundles of a kernel, `tpu` and `gpu` have the settings of ahead-of-time
compilation, `aot` compiles a sharded step, `workloads` has the matrices of three language models,
`model_parts` full models in parts, `report` writes the results.
"""
