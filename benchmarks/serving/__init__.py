"""What experts cost while serving, against base vLLM and vLLM's own LoRA: `make bench`.

settings            sizes of a run: the full one and the quick one
models, experts     random-weight Llamas, and a substrate and experts for them, made without training
traffic, trace      prompts that call for experts or do not; when they arrive
offline             decode and prefill throughput, engines side by side in one process
online              real servers under replayed arrivals
switch, gaps        activations under load
startup             seconds and memory of a start
blocks, block       what is measured in which process, and what is kept of it
figures, report     the figures of `docs/results/serving.json`, and their page
floor               the bytes and FLOPs that the delta must move
profile, operators  where the time of a step goes
"""
