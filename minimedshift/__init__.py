"""MedShift from scratch. The files beside this one are the method, in reading order:

    flow.py coupling.py balance.py    what is learned: bridge and loss, which noise goes with which image
                                      (assignment.py solves the exact one)
    model.py ops.py                   the network, and its fused kernels
    sampler.py                        from noise to image and back: ODE and SDE solvers, translation
    student.py finish.py bands.py     one evaluation instead of many: the student and its last touch
    data.py phantom/                  what it learns from: your folders, or simulated heads
    evaluate.py bench.py study.py     commands that measure (python -m minimedshift.NAME)
    support/                          what serves: flags, batches, checkpoints, the machine, image files
"""
