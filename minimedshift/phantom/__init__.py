"""A head phantom under five kinds of X-ray physics. All domains are simulated.

The same head can be drawn in every domain, so a translation has a ground truth. In reading order:

    anatomy.py   what a head is: a table of ellipsoids and capsules, and how heads vary
    rays.py      how many centimetres of bone, soft tissue and brain each ray crosses
    xray.py      what a picture is: attenuation, scatter, blur, noise, enhancement, grey levels
    sets.py      which heads are drawn in which domains; the cache
"""

from minimedshift.phantom.anatomy import PRIORS, Head, population
from minimedshift.phantom.rays import project
from minimedshift.phantom.xray import DOMAINS, PHYSICS, picture, render

# The version changes with anatomy, priors and physics. Numbers measured with another version do not count.
VERSION = 2
