"""A head phantom under five kinds of X-ray physics, in reading order anatomy.py, rays.py, xray.py, sets.py.
The same head can be drawn in every domain, so a translation has a ground truth. All domains are simulated."""

from minimedshift.phantom.anatomy import PRIORS, Head, population
from minimedshift.phantom.rays import project
from minimedshift.phantom.xray import DOMAINS, PHYSICS, picture, render

# The version changes with anatomy, priors and physics. Numbers measured with another version do not count.
VERSION = 2
