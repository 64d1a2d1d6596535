#!/usr/bin/env bash
# torchcfm 1.0.7 with POT 0.9.7: the entropic coupling of a Schroedinger bridge, for 128 pairs of noise and image.
# Expected: the smaller sigma, the nearer its plan is to the exact one, whose entropy above log 128 is 0.
# What happens: at 32x32 pixels the share of entropy falls from 1 to .67 as sigma goes from 10 to 3. At 1, which is
# the class's default, and below, it is 1 again: all of exp(-cost / (2 sigma^2)) underflows, and the sampler takes
# the uniform plan, independent pairs, with a warning. With 4x4 pixels that begins below .5.
# Output seen: 4x4: sigma 10 1.00, 3 0.99, 1 0.67, 0.5 0.24, 0.1 1.00; 32x32: 10 1.00, 3 0.67, 1 1.00, 0.5 1.00
# Bitten: whoever tunes sigma on points in the plane, and trains on images: the ablation shows no coupling at all.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
python3 -m venv venv
venv/bin/pip install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6 POT==0.9.7.post1 torchcfm==1.0.7
venv/bin/python -W ignore - <<'PY'
import warnings

import numpy as np
import torch
from torchcfm.conditional_flow_matching import SchrodingerBridgeConditionalFlowMatcher


def share_of_entropy(side, sigma):
    """(H(plan) - log n) / log n: 0 for one image to each noise, 1 for independent pairs. And what is warned."""
    torch.manual_seed(0)
    x0, x1 = torch.randn(128, 1, side, side), torch.rand(128, 1, side, side) * 2 - 1
    matcher = SchrodingerBridgeConditionalFlowMatcher(sigma=sigma, ot_method="sinkhorn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plan = matcher.ot_sampler.get_map(x0, x1)
    plan = plan[plan > 0] / plan.sum()
    reverted = any("uniform plan" in str(warning.message) for warning in caught)
    return (-(plan * np.log(plan)).sum() - np.log(128)) / np.log(128), reverted


for side, expected in ((4, {10.: 1, 3.: .99, 1.: .67, .5: .24, .1: 1}), (32, {10.: 1, 3.: .67, 1.: 1, .5: 1})):
    found = {sigma: share_of_entropy(side, sigma) for sigma in expected}
    print(f"{side}x{side}:", {sigma: f"{share:.2f}" + ", uniform" * bool(reverted)
                              for sigma, (share, reverted) in found.items()})
    for sigma, (share, reverted) in found.items():
        assert abs(share - expected[sigma]) < .03, "the behaviour has changed"
        assert reverted == (sigma < (.5 if side == 4 else 3)), "the behaviour has changed"
PY
