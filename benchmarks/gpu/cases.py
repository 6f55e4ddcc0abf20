"""What is run, in order of its worth: what comes last is left out first where the time is over."""

from __future__ import annotations

from gpu.harness import Case

CORRECTNESS, SPEED, PLANNER = "Correctness", "Speed", "Planner against reality"
SECTIONS = {"correctness": CORRECTNESS, "speed": SPEED, "planner": PLANNER}
"""By the name that --only takes."""

STRATEGIES = ("ddp", "fsdp", "zero1", "zero2", "zero3", "fairscale")
OFFLOADED = ("fsdp", "zero2")
ORACLE = "float64 on the CPU"
NETWORKS = ("resnet50", "regnet_y_16gf", "regnet_y_128gf")

CASES = [
    Case(CORRECTNESS, ORACLE, "gpu.strategies:oracle", 60),
    *(Case(CORRECTNESS, name, "gpu.strategies:compare", 45, (name,), after=ORACLE) for name in STRATEGIES),
    *(
        Case(
            CORRECTNESS,
            f"{name} in host memory",
            "gpu.strategies:compare",
            45,
            (name, "parallel.cpu_offload=true"),
            after=ORACLE,
        )
        for name in OFFLOADED
    ),
    Case(CORRECTNESS, "Every method against float64 on the CPU, relative errors", "gpu.methods:compare", 90),
    Case(CORRECTNESS, "Waiting for the device", "gpu.numerics:steps_that_wait", 30),
    Case(CORRECTNESS, "Saving in the background", "gpu.runs:staging", 45),
    Case(CORRECTNESS, "Resuming bit for bit, demo network", "gpu.runs:resume", 90, ("AdamW",)),
    Case(CORRECTNESS, "Synchronised BatchNorm against float64, relative errors", "gpu.numerics:batchnorm", 30),
    Case(CORRECTNESS, "Pooling against float64, relative errors", "gpu.numerics:pools", 30),
    Case(CORRECTNESS, "Sinkhorn against float64", "gpu.numerics:codes", 30),
    Case(CORRECTNESS, "Augmentation", "gpu.numerics:augmentation", 100),
    Case(CORRECTNESS, "Recomputed blocks against kept ones", "gpu.numerics:blocks", 30, ("recompute_stages",)),
    Case(SPEED, "A training step and each choice undone", "gpu.speed:steps", 170, worth_s=60),
    Case(CORRECTNESS, "Compiled blocks against eager ones", "gpu.numerics:blocks", 90, ("compile_stages",)),
    Case(CORRECTNESS, "FairScale's FSDP, which is no strategy here", "gpu.strategies:fairscale_fsdp", 30),
    Case(CORRECTNESS, "Out of memory", "gpu.runs:out_of_memory", 60),
    Case(CORRECTNESS, "Resuming bit for bit, ResNet-50", "gpu.runs:resume", 90, ("ResNet-50",)),
    *(Case(PLANNER, name, "gpu.planner:compare", 60, (name,)) for name in NETWORKS),
    Case(CORRECTNESS, "The demo, from images to accuracies", "gpu.runs:demo", 150, worth_s=90),
    Case(SPEED, "The stream, and a run that waits for it", "gpu.loading:compare", 120, worth_s=50),
    Case(SPEED, "Kernels of a step", "gpu.profile:kernels", 60, worth_s=25),
    Case(SPEED, "Sinkhorn against the published form", "gpu.speed:codes", 40),
    Case(SPEED, "A step and its codes", "gpu.speed:exposed", 60, worth_s=25),
    Case(SPEED, "A step of each published recipe", "gpu.methods:costs", 150, worth_s=40),
]
