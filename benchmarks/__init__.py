"""The benchmark: what this engine ships, beside what others ship, verified before it is timed.

run.py is the door (``python benchmarks/run.py --seq 512``), gpu.py the list of cases that a GPU is borrowed for.

    workload     real text to batches, the same for every contender; sizes of models
    contenders   what is compared, and the one way to build each and to make its step
    onnx_openvino  encoders of other libraries
    operators    each operator and optimiser alone: a table of operands, both sides, what it has to do
    clock        seconds: of a step, of its kernels, of a call with cold caches, interleaved; quantiles and ratios
    memory       peak memory of a step
    limits       what the machine can do: products, copies, launches
    parity       the gate: the step that is timed, encoders and operators, each against float64
    steps        a table of steps: warmed up, timed in rounds, rates
    finetuning   training and prediction of tasks, beside transformers' Trainer
    results      one schema, one file, whole after every row
    tables       what a person reads: tables and pictures
    report       results/ into docs/performance.md
    contrastive  a script of its own: sentence-transformers' training step on an accelerated model
    supervise    cases in a process of their own: a hang or a lost device costs one
    predict/     the step model, the aims

An import points to what stands above it, or to ``bert_fast``; nothing in ``bert_fast`` imports this package.
"""
