"""A head phantom under five kinds of X-ray physics. All domains are simulated.

The same head can be drawn in every domain, so translation has a ground truth. Read it top to bottom. The
head is a table of ellipsoids and capsules (PARTS). `Head` varies, poses and frames that table. `project`
finds how many centimetres of bone, soft tissue and brain each ray crosses. A chain of short functions
(attenuate, add_scatter, blur, add_quantum_noise, enhance, lookup) makes a picture of them.

Head coordinates in cm: x to the side, y to the front, z up; origin at the centre of the cranium.
"""

import contextlib
import dataclasses
import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F

# Version of anatomy, priors and physics. They change only together with it; older measurements are then void.
VERSION = 2
DOMAINS = ("synthetic-low", "synthetic-high", "real-low", "real-normal", "real-exposure")

# ------------------------------------------------------------------------------------------------------------
# Anatomy as data. Overlaps add: the density of a material at a point is the sum over all parts that contain
# the point, so a hollow is a part with negative density.
# What each kind of part adds: (bone, soft tissue, brain), 1 = full density.

FILLS = {
    "flesh": (0., 1., 0.), "fat": (0., -.4, 0.), "air": (0., -1., 0.),
    "skull": (1., -1., 0.), "diploe": (-.7, 0., 0.), "table": (.7, 0., 0.), "brain": (-1., 0., 1.),
    "bone": (.8, -.7, 0.), "hollow": (-.8, .7, 0.), "cortex": (1.15, -1., 0.),
    "sinus": (-.8, -.3, 0.), "void": (-.6, 0., 0.),
    "petrous": (.9, 0., -.9), "root": (.5, -.4, 0.), "enamel": (.9, -.1, 0.),
    "suture": (-.55, 0., 0.), "groove": (-.4, 0., 0.),      # fine lines, in the real domains only
}
FILL_NAMES = tuple(FILLS)
FINE_FILLS = ("suture", "groove")

# Four planes hinged on one axis slice the head like a cake, so that flesh is never counted twice:
# vault front | face | neck | vault back.
HINGE = (-1.0, -6.6)
# directions from the hinge in degrees: to the skull base, from chin to throat, from occiput to nape
BASE, THROAT, NAPE = 31.0, -46.0, 178.0


def plane(degrees, side):
    """Half-space n.x <= h as (nx, ny, nz, h): n is a unit vector, h in cm.

    Its plane leaves the hinge in a (y, z) direction; side +1 keeps what is clockwise of it.
    """
    a = math.radians(degrees)
    ny, nz = -side * math.sin(a), side * math.cos(a)
    return (0., ny, nz, ny * HINGE[0] + nz * HINGE[1])


def beyond(centre, end):
    """Half-space (nx, ny, nz, h) that cuts off what lies beyond centre + end, square to end."""
    n = np.array(end) / np.linalg.norm(end)
    return (*n, n @ np.add(centre, end))


FRONT, BACK = plane(90., +1), plane(90., -1)
ABOVE, BELOW = plane(BASE, -1), plane(BASE, +1)
FACE, NECK = plane(THROAT, -1), plane(THROAT, +1)
OCCIPUT, NUCHAL = plane(NAPE, +1), plane(NAPE, -1)

# The vault is two half ellipsoids, long in front, short behind, widest at the parietal bones where they meet.
VAULT_CENTRE, VAULT_FRONT, VAULT_BACK = (0., -1., 0.), (7.1, 9.5, 7.0), (7.1, 8.3, 7.0)
# fill, depth as a share of the bone's thickness
VAULT_LAYERS = (("skull", 0.), ("diploe", .27), ("table", .75), ("brain", 1.))

# group, fill, centre, semi-axes, tilt in degrees about x, y, z, and up to two vectors: what lies beyond
# centre + vector is cut off. A part with x > 0 comes with its mirror image.
ELLIPSOIDS = [
    # orbit: wall and rim, hollow, fat; roof and floor slope
    ("face", "bone",   (3.2, 6.4, -3.0), (2.1, 2.7, 1.98), (8, 0, -20), (.45, -.1, 1.62), (-.5, .15, -1.66)),
    ("face", "hollow", (3.3, 6.9, -3.0), (1.92, 2.8, 1.8), (8, 0, -20), (.43, -.1, 1.53), (-.47, .14, -1.55)),
    ("face", "fat",   (3.2, 6.6, -3.0), (1.85, 2.3, 1.73), (8, 0, -20), (.41, -.1, 1.47), (-.45, .13, -1.49)),
    ("face", "bone",   (3.9, 4.4, -3.3), (.16, 2.2, 1.9), (0, 0, -35)),     # greater wing of the sphenoid
    ("face", "void",   (1.1, 8.0, -.7), (1.1, .35, .9), (0, 15, 0)),        # frontal sinus
    ("face", "bone",   (.9, 5.4, -3.1), (.85, 2.0, 1.4), (0, 0, 0)),        # ethmoid and its cells
    ("face", "sinus",  (.9, 5.4, -3.1), (.65, 1.8, 1.2), (0, 0, 0)),
    ("face", "bone",   (0, 2.8, -4.8), (2.3, 1.5, 1.0), (-20, 0, 0)),       # sphenoid and its sinus
    ("face", "sinus",  (.75, 3.0, -4.8), (.65, 1.1, .75), (-20, 0, 0)),
    # maxilla and its sinus
    ("face", "bone",   (2.6, 6.0, -5.7), (1.5, 2.2, 1.85), (-12, 20, 15), (-.25, .1, 1.45), (.85, .8, -.85)),
    ("face", "sinus",  (2.6, 5.9, -5.6), (1.3, 1.9, 1.6), (-12, 20, 15), (-.22, .1, 1.2), (.72, .65, -.72)),
    ("face", "root",   (0, 6.4, -7.2), (2.6, 2.1, .6), (0, 0, 0)),         # alveolar ridge, hard palate
    ("face", "bone",   (0, 4.6, -6.9), (2.2, 2.6, .12), (0, 0, 0)),
    ("face", "air",    (0, 6.6, -5.3), (1.15, 3.0, 1.9), (0, 0, 0)),        # nasal cavity, septum, turbinates
    ("face", "bone",   (0, 6.3, -5.2), (.09, 2.7, 1.8), (0, 0, 0)),
    ("face", "bone",   (.7, 6.0, -6.0), (.25, 1.9, .4), (0, 0, 0)),
    ("face", "bone",   (5.0, 5.8, -5.0), (1.35, .95, 1.0), (0, 0, -30)),     # cheek bone
    ("face", "bone",   (1.7, 3.7, -6.3), (.15, .8, 1.4), (0, 0, 0)),        # pterygoid plate
    ("face", "air",    (0, 5.4, -8.2), (2.0, 2.2, .35), (0, 0, 0)),         # mouth
    ("base", "petrous", (3.7, -1.2, -4.9), (.8, 3.0, .8), (0, 0, 50)),     # petrous ridge
    ("base", "bone",   (5.0, -2.0, -5.7), (.9, 1.3, 1.5), (0, 12, 0)),     # mastoid and its air cells
    ("base", "void",   (5.0, -2.0, -5.6), (.6, .95, 1.1), (0, 0, 0)),
    ("base", "bone",   (1.8, -1.2, -7.3), (.7, 1.1, .55), (0, 0, 0)),       # occipital condyle
    ("base", "bone",   (0, 7.9, -1.9), (1.5, .6, .8), (0, 0, 0)),           # root of the nose
    ("jaw", "bone",    (0, 7.0, -11.0), (1.2, .55, 1.1), (0, 0, 0)),       # chin
    ("jaw", "cortex",  (5.2, .4, -5.3), (.9, .45, .5), (0, 0, 15)),         # condyle
    ("ear", "flesh",   (7.9, -1.3, -3.7), (.35, 1.7, 2.9), (0, -14, 25)),
    ("skin", "flesh",  (0, 9.4, -4.7), (1.2, 1.2, 1.7), (-20, 0, 0)),       # nose
]

# group, fill, one end, other end, radii (sideways, across)
CAPSULES = [
    ("face", "bone", (5.5, 5.0, -4.9), (6.1, .8, -4.6), (.2, .38)),        # zygomatic arch
    ("face", "bone", (5.0, 6.1, -4.3), (4.9, 6.3, -1.5), (.35, .35)),    # orbital rims: lateral, upper, lower
    ("face", "bone", (1.6, 8.0, -1.4), (4.6, 7.0, -1.2), (.33, .33)),
    ("face", "bone", (1.7, 7.9, -4.8), (4.5, 6.8, -4.9), (.28, .28)),
    ("face", "bone", (.25, 8.6, -2.0), (.35, 9.3, -3.4), (.16, .22)),       # nasal bone
    ("base", "bone", (0, 1.4, -4.9), (0, -1.2, -6.7), (1.2, .5)),           # clivus
    ("base", "bone", (4.6, -1.4, -7.2), (3.8, .2, -9.4), (.12, .12)),       # styloid
    ("jaw", "cortex", (1.2, 6.9, -11.1), (4.5, 2.4, -9.7), (.55, 1.05)),       # body, ramus, coronoid
    ("jaw", "cortex", (4.7, 1.6, -9.2), (5.1, 1.0, -6.0), (.36, 1.2)),
    ("jaw", "cortex", (4.8, 2.3, -7.0), (4.7, 2.7, -5.5), (.22, .4)),
    ("neck", "flesh", (0, -.9, -10.5), (0, .4, -36.), (5.0, 5.2)),          # the neck itself
    ("neck", "air",  (0, 2.4, -8.5), (0, 3.0, -30.), (.85, .6)),            # throat
    ("neck", "bone", (0, -.9, -7.6), (0, -.9, -9.6), (.45, .45)),           # dens
]


def spine(levels=5):
    """Rows for `levels` neck vertebrae: body, lateral mass, lamina, spinous and transverse process."""
    ellipsoids, capsules = [], []
    for i in range(levels):
        y, z = -1.2 + .12 * i, -8.3 - 1.65 * i
        ellipsoids += [("neck", "bone", (0, y, z), (1.15, .85, .62), (0, 0, 0)),
                       ("neck", "bone", (1.5, y - .9, z), (.65, .75, .5), (0, 0, 0))]
        capsules += [("neck", "bone", (1.5, y - 1.5, z), (.2, y - 2.8, z - .3), (.25, .4)),
                     ("neck", "bone", (0, y - 2.8, z - .3), (0, y - 4.3, z - .9), (.22, .35)),
                     ("neck", "bone", (1.5, y - .5, z), (2.5, y - .6, z - .1), (.3, .3))]
    return ellipsoids, capsules


def teeth():
    """Rows for 28 teeth along the dental arch, each a root and an enamel crown."""
    rows = []
    arch = ((.42, 8.0, .40), (1.15, 7.75, .33), (1.75, 7.25, .36), (2.2, 6.6, .33),
            (2.55, 5.9, .34), (2.85, 5.0, .48), (3.05, 3.9, .46))                 # x, y, half width
    for x, y, w in arch:
        rows += [("teeth", "root", (x, y - .1, -7.2), (.8 * w, .3, 1.1), (5, 0, 0)),
                 ("teeth", "enamel", (x, y, -8.15), (w, .36, .48), (0, 0, 0)),
                 ("jaw", "root", (.93 * x, y - .4, -10.0), (.75 * w, .3, 1.1), (-5, 0, 0)),
                 ("jaw", "enamel", (.93 * x, y - .25, -9.05), (.9 * w, .34, .46), (0, 0, 0))]
    return rows


def vault_lines():
    """Rows for sutures in mid-bone (zigzags) and vessel grooves on its inside: chains of thin capsules."""
    angles = np.linspace(.02, 1, 10)
    coronal = [(math.sin(a), .28 - .1 * a, math.cos(a)) for a in 1.75 * angles]
    lambdoid = [(math.sin(a), -.85 - .15 * a, .55 * math.cos(a)) for a in 1.2 * angles]
    sagittal = [(0., math.sin(a), math.cos(a)) for a in np.linspace(.28, -1.05, 11)]
    lines = [("suture", .012, coronal), ("suture", .015, lambdoid), ("suture", 0., sagittal)]
    for front, up in ((.1, 1.2), (-.6, 1.), (-.9, .6)):                          # branches of an artery
        branch = [(1., .25 + front * t, -.45 + up * t) for t in np.linspace(0, 1, 6)]
        lines.append(("groove", 0., branch))

    def on_vault(direction, share):
        """The point that lies in this direction, at a share of the vault's semi-axes."""
        axes = VAULT_FRONT if direction[1] > 0 else VAULT_BACK
        return VAULT_CENTRE + share * direction / np.linalg.norm(direction) * axes

    rows = []
    for fill, wiggle, points in lines:
        share, radius = (.955, .085) if fill == "suture" else (.935, .11)
        for i, (start, end) in enumerate(zip(points, points[1:])):
            move = (-1) ** i * wiggle
            a = on_vault(np.add(start, (0, move, 0)), share)
            b = on_vault(np.add(end, (0, -move, 0)), share)
            rows.append(("vault", fill, a, b, (radius, radius)))
    return rows


def euler(degrees):
    """Rotation matrices (..., 3, 3) for angles (..., 3) in degrees about x, then y, then z."""
    a = np.radians(np.asarray(degrees, float))
    cx, cy, cz = np.moveaxis(np.cos(a), -1, 0)
    sx, sy, sz = np.moveaxis(np.sin(a), -1, 0)
    rows = [cz * cy, cz * sy * sx - sz * cx, cz * sy * cx + sz * sx,
            sz * cy, sz * sy * sx + cz * cx, sz * sy * cx - cz * sx,
            -sy, cy * sx, cy * cx]
    return np.stack(rows, -1).reshape(a.shape[:-1] + (3, 3))


def build_parts():
    """All parts as arrays: what `Head` varies and poses.

    Part k is {x : y = axes^-1 rotation^T (x - centre) lies within distance 1 of the segment |y_z| <= length},
    cut by up to two half-spaces n.x <= h. length 0 is an ellipsoid.
    Mirror pairs share `pair`, so that they vary together.
    """
    no_cut = (0., 0., 0., 1.)
    parts, twins = [], 0

    def add(group, fill, centre, axes, rotation, length=0., cuts=(), depth=0.):
        nonlocal twins
        cuts = (tuple(cuts) + (no_cut, no_cut))[:2]
        sides = (1., -1.) if centre[0] > 0 else (1.,)
        for side in sides:
            flip = np.diag([side, 1., 1.])
            mirror = np.array([side, 1., 1., 1.])
            parts.append(dict(
                group=group, fill=FILL_NAMES.index(fill), centre=flip @ np.array(centre, float), axes=axes,
                rotation=flip @ rotation @ flip, length=length, cuts=cuts * mirror, depth=depth,
                pair=twins, side=side))
        twins += 1

    eye = np.eye(3)
    add("skin", "flesh", VAULT_CENTRE, VAULT_FRONT, eye, cuts=(FRONT, ABOVE), depth=-1.)
    add("skin", "flesh", VAULT_CENTRE, VAULT_BACK, eye, cuts=(BACK, OCCIPUT), depth=-1.)
    add("skin", "flesh", (0., 1.5, -4.8), (6.3, 7.5, 10.2), eye, cuts=(BELOW, FACE), depth=-1.)
    for fill, depth in VAULT_LAYERS:
        add("vault", fill, VAULT_CENTRE, VAULT_FRONT, eye, cuts=(FRONT, ABOVE), depth=depth)
        add("vault", fill, VAULT_CENTRE, VAULT_BACK, eye, cuts=(BACK,), depth=depth)
    for fill, depth in (VAULT_LAYERS[0], VAULT_LAYERS[-1]):  # the two hollows under the temporal lobes
        tilt = euler((BASE, 0, 0))
        add("vault", fill, (2.9, 2.4, -4.55), (2.4, 3.6, 1.9), tilt, cuts=(BELOW,), depth=depth)
    more_ellipsoids, more_capsules = spine()
    for group, fill, centre, axes, tilt, *ends in ELLIPSOIDS + more_ellipsoids + teeth():
        add(group, fill, centre, axes, euler(tilt), cuts=[beyond(centre, end) for end in ends])
    for group, fill, a, b, radii in CAPSULES + more_capsules + vault_lines():
        a, b = np.array(a, float), np.array(b, float)
        distance = np.linalg.norm(b - a)
        along = (b - a) / distance
        sideways = (0., 1., 0.) if abs(along[0]) > .9 else (1., 0., 0.)          # not parallel to the capsule
        across = np.cross(sideways, along)
        across /= np.linalg.norm(across)
        rotation = np.stack([np.cross(across, along), across, along], 1)
        axes = (*radii, radii[0])
        cuts = (NECK, NUCHAL) if fill == "flesh" else ()
        add(group, fill, (a + b) / 2, axes, rotation, distance / 2 / radii[0], cuts)
    return {key: np.array([p[key] for p in parts]) for key in parts[0]}


PARTS = build_parts()
CUTS = (PARTS["cuts"][:, :, :3] != 0).any(2).sum(1)
CAPSULE = PARTS["length"] > 0
FINE = np.isin(PARTS["fill"], [FILL_NAMES.index(fill) for fill in FINE_FILLS])

# ------------------------------------------------------------------------------------------------------------
# Priors: how heads, poses and frames are drawn.
# Angles in degrees, lengths in cm; (mean, spread) unless said otherwise.


@dataclasses.dataclass(frozen=True)
class Prior:
    turns: tuple            # (weight, mean, spread) of the turn about the long axis: 0 frontal, +-90 lateral
    tilt: tuple             # cranial (+) or caudal (-) angle
    roll: tuple             # in the image plane
    field: tuple            # half the side of the frame, lowest and highest
    shift: float            # spread of the head's place in the frame
    skin: tuple             # thickness of the scalp, lowest and highest
    ears: float             # probability of ears
    spread: float           # of the anatomy, 1 = human range


SHARED = Prior(
    turns=((.3, 0, 10), (.12, 90, 6), (.12, -90, 6), (.25, 45, 15), (.21, -45, 15)),
    tilt=(0, 11), roll=(0, 14),
    field=(10., 12.5), shift=.9, skin=(.35, 1.1), ears=.5, spread=1.)
SYNTHETIC = Prior(
    turns=((1., 0, 14),), tilt=(-3, 8), roll=(4, 11),
    field=(10.5, 12.5), shift=1.1, skin=(.5, 1.2), ears=.9, spread=1.2)
REAL = Prior(
    turns=((.7, -58, 17), (.3, 58, 17)), tilt=(3, 9), roll=(14, 14),
    field=(9.8, 11.5), shift=1., skin=(.3, .8), ears=.2, spread=.7)
OWN_PRIOR = {
    "synthetic-low": SYNTHETIC,
    "synthetic-high": dataclasses.replace(SYNTHETIC, roll=(-6, 10), tilt=(-6, 8)),
    "real-low": REAL,
    "real-normal": REAL,
    "real-exposure": dataclasses.replace(REAL, roll=(4, 9), shift=.5, field=(10., 11.5)),
}
SOURCE_DISTANCE = 75.       # cm from the X-ray source to the isocentre plane, in which pixels are measured


def derive_seed(*keys):
    """A 63-bit seed from integers and strings, the same on every machine (FNV-1a with a final mix)."""
    state = 0xCBF29CE484222325
    for byte in repr(keys).encode():
        state = (state ^ byte) * 0x100000001B3 % 2**64
    state = (state ^ state >> 31) * 0x9E3779B97F4A7C15 % 2**64
    return (state ^ state >> 29) >> 1


def population(seed, domain, shift):
    """`domain` for a share `shift` of the training heads' seeds, else None, the population that all share."""
    return domain if derive_seed(seed, "population") < shift * 2**63 else None


@dataclasses.dataclass(frozen=True)
class Head:
    """One anatomy, pose and frame, deterministic in (seed, prior, anatomy).

    prior: a domain with a population of its own, or None for the one that all share.
    anatomy: the seed of the body, if not the head's own.
    matrix (K, 3, 3) takes camera space to each part's own space, centre (K, 3), cuts (K, 2, 4).
    field: half the frame's side.
    Camera coordinates in cm: (u, v) is the pixel's place in the isocentre plane; the third axis points away
    from the source, which is at (0, 0, -SOURCE_DISTANCE).
    """
    seed: int
    prior: str | None = None
    anatomy: int | None = None
    matrix: np.ndarray = dataclasses.field(init=False, repr=False, compare=False)
    centre: np.ndarray = dataclasses.field(init=False, repr=False, compare=False)
    cuts: np.ndarray = dataclasses.field(init=False, repr=False, compare=False)
    field: float = dataclasses.field(init=False, compare=False)
    view: tuple = dataclasses.field(init=False, compare=False)  # turn, tilt, roll in degrees

    def __post_init__(self):
        if self.prior is not None:
            check_domain(self.prior)
        object.__setattr__(self, "seed", int(self.seed))  # numpy integers would hash differently
        prior = OWN_PRIOR.get(self.prior, SHARED)
        person = self.seed if self.anatomy is None else int(self.anatomy)
        anatomy = vary(np.random.default_rng(derive_seed(person, "anatomy", self.prior)), prior)

        rng = np.random.default_rng(derive_seed(self.seed, "view", self.prior))
        _, *turn = prior.turns[rng.choice(len(prior.turns), p=[weight for weight, _, _ in prior.turns])]
        view = tuple(mean + spread * float(np.clip(rng.standard_normal(), -2, 2))
                     for mean, spread in (turn, prior.tilt, prior.roll))
        field = rng.uniform(*prior.field)
        shift = np.clip(rng.standard_normal(2), -2, 2) * prior.shift
        for name, value in zip(("matrix", "centre", "cuts"), place(*anatomy, view, shift)):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "field", float(field))
        object.__setattr__(self, "view", view)


def vary(rng, prior):
    """Draw one anatomy: the parts' matrix (K, 3, 3), centre (K, 3), cuts (K, 2, 4); head coordinates, cm."""
    p, spread = PARTS, prior.spread
    count, pairs = len(p["pair"]), p["pair"][-1] + 1
    normal = lambda *shape: np.clip(rng.standard_normal(shape), -2.2, 2.2)
    rigid = np.isin(p["group"], ("vault", "skin"))[:, None]  # nested surfaces must stay nested

    mirror = np.stack([p["side"], np.ones(count), np.ones(count)], 1)
    shift = .07 * spread * normal(pairs, 3)[p["pair"]] * mirror
    shift[p["centre"][:, 0] == 0, 0] = 0  # a part in the middle stays there but for what follows
    shift = shift + .02 * spread * normal(count, 3)
    axes = p["axes"] * np.exp(.06 * spread * normal(pairs, 3)[p["pair"]] * ~rigid)
    centre = p["centre"] + shift * ~rigid

    # of the vault: side, front and back, top
    thickness = np.array([.45, .55, .55]) * math.exp(.12 * spread * normal(1)[0])
    skin = rng.uniform(*prior.skin)
    depth = p["depth"][:, None]
    axes = axes - np.maximum(depth, 0) * thickness + np.maximum(-depth, 0) * skin
    axes[p["group"] == "ear"] *= 1. if rng.random() < prior.ears else 1e-3

    rotation = p["rotation"]
    opening = rng.uniform(0, 9) * spread
    nod = 7 * spread * normal(1)[0]
    for group, pivot, angle in (("jaw", (0, .4, -5.3), -opening), ("neck", (0, -1., -7.), nod)):
        turn = euler((angle, 0, 0))
        mine = p["group"] == group
        centre[mine] = (centre[mine] - pivot) @ turn.T + pivot
        rotation = np.where(mine[:, None, None], turn @ rotation, rotation)

    # long and short, broad and narrow faces; the cuts of the face move with their part
    face = np.isin(p["group"], ("face", "jaw", "teeth"))[:, None]
    stretch = 1 + (np.array([.03, 0., .09]) + spread * np.array([.04, .0, .05]) * normal(3)) * face
    centre = (centre - (0, 0, -2.)) * stretch + (0, 0, -2.)
    moved = face * (centre - p["centre"])
    cuts = p["cuts"].copy()
    cuts[:, :, 3] += (cuts[:, :, :3] * moved[:, None]).sum(2)

    size = 1 + spread * (np.array([.035, .035, .035]) * normal(3) + .02 * normal(1))
    matrix = np.swapaxes(rotation, 1, 2) / axes[:, :, None] / (size * stretch)[:, None, :]
    cuts[:, :, :3] /= size
    return matrix, centre * size, cuts


def place(matrix, centre, cuts, view, shift):
    """Turn, tilt and roll an anatomy and put it into the frame: head to camera coordinates, shapes kept."""
    turn, tilt, roll = view
    upright = np.array([[1., 0, 0], [0, 0, 1.], [0, 1., 0]])  # (x, y, z) -> (u, v, depth) of a frontal view
    pose = euler((0, 0, roll)) @ euler((tilt, 0, 0)) @ upright @ euler((0, 0, turn))
    middle = pose @ np.array([0., .8, -3.0])  # what the frame is centred on
    move = np.array([shift[0], shift[1], 0.]) - middle
    cuts = cuts.copy()
    cuts[:, :, :3] = cuts[:, :, :3] @ pose.T
    cuts[:, :, 3] += cuts[:, :, :3] @ move
    return matrix @ pose.T, centre @ pose.T + move, cuts


# ------------------------------------------------------------------------------------------------------------
# Line integrals. A ray is x(t) = (u, v, 0) + t d, d = (u, v, D). In a part's own space: y0 + t w, w = M d.
# The point of the ray level with the part's centre gives y0 = k (M_u du + M_v dv): linear in the distance
# (du, dv) from the projected centre.


def outline(mu, mv, mw, centre):
    """The silhouette of ellipsoids as seen from the source.

    mu, mv, mw (B, K, 3) are the columns of each part's matrix, centre (B, K, 3). Returns the projected centre
    (uc, vc), the level k, w at the centre, and the coefficients of two polynomials in (du, dv):
    A = A0 + A1 du + A2 dv + A3 du^2 + A4 du dv + A5 dv^2 and Q = Q0 du^2 + Q1 du dv + Q2 dv^2.
    """
    dot = lambda x, y: (x * y).sum(-1)
    k = 1 + centre[..., 2] / SOURCE_DISTANCE
    uc, vc = centre[..., 0] / k, centre[..., 1] / k
    wc = mu * uc[..., None] + mv * vc[..., None] + mw * SOURCE_DISTANCE
    a, b = np.cross(mu, wc) * k[..., None], np.cross(mv, wc) * k[..., None]
    linear = [dot(wc, wc), 2 * dot(mu, wc), 2 * dot(mv, wc)]
    square = [dot(mu, mu), 2 * dot(mu, mv), dot(mv, mv)]
    A = np.stack(linear + square, -1)
    Q = np.stack([dot(a, a), 2 * dot(a, b), dot(b, b)], -1)
    return dict(k=k, uc=uc, vc=vc, wc=wc, A=A, Q=Q)


def geometry(heads):
    """Everything about the parts that does not depend on the pixel, float64: a dict of arrays (B, K, ...)."""
    matrix = np.stack([head.matrix for head in heads])
    centre = np.stack([head.centre for head in heads])
    cuts = np.stack([head.cuts for head in heads])
    mu, mv, mw = matrix[..., 0], matrix[..., 1], matrix[..., 2]
    own = dict(mu=mu, mv=mv, mw=mw, centre=centre, depth=centre[..., 2], cuts=cuts)
    return own | outline(mu, mv, mw, centre)


def boxes(g, field, size):
    """Pixel boxes (B, K, 4) round the parts: first and last row, first and last column (exclusive)."""
    axis = np.linalg.inv(np.stack([g["mu"], g["mv"], g["mw"]], -1))[..., 2]  # own z axis in camera space
    ends = []
    for end in (-1., 1.):  # the balls at both ends of the segment
        e = outline(g["mu"], g["mv"], g["mw"], g["centre"] + axis * (end * PARTS["length"])[:, None])
        A, Q, uc, vc = e["A"], e["Q"], e["uc"], e["vc"]
        # A - Q >= 0 is an ellipse, x^T H x - 2 n.x <= A_0
        h11, h12, h22 = Q[..., 0] - A[..., 3], (Q[..., 1] - A[..., 4]) / 2, Q[..., 2] - A[..., 5]
        n1, n2 = A[..., 1] / 2, A[..., 2] / 2
        det = h11 * h22 - h12 * h12
        x, y = (h22 * n1 - h12 * n2) / det, (h11 * n2 - h12 * n1) / det
        r = A[..., 0] + n1 * x + n2 * y
        du, dv = np.sqrt(r * h22 / det), np.sqrt(r * h11 / det)
        ends.append(np.stack([-(vc + y + dv), -(vc + y - dv), uc + x - du, uc + x + du], -1))
    box = np.where([True, False, True, False], np.minimum(*ends), np.maximum(*ends))
    pixels = (box / field[:, None, None] + 1) / 2 * size
    return np.clip(np.round(pixels + (-1, 1, -1, 1)), 0, size).astype(int)


def ellipsoid_spans(part, u, v, du, dv, cuts=0):
    """Length in units of t of each ray inside ellipsoids, cut by the first `cuts` half-spaces.

    Uncut, 2 sqrt(A - Q) / A. A = |w|^2 and Q = |y0 x w|^2 are quadratic in (du, dv), measured from the
    projected centre. There the cross product vanishes. It is linear, so Q has no lower terms: float32 loses
    nothing. part: tensors (N, ...); u, du (N, 1, cols); v, dv (N, rows, 1).
    """
    a0, a1, a2, a3, a4, a5 = part["A"][:, :, None, None].unbind(1)
    q0, q1, q2 = part["Q"][:, :, None, None].unbind(1)
    area = dv * (du * a4)
    area += du * (du * a3 + a1) + a0
    area += dv * (dv * a5 + a2)
    inside = dv * (du * (a4 - q1))
    inside += du * (du * (a3 - q0) + a1) + a0
    inside += dv * (dv * (a5 - q2) + a2)
    half = inside.clamp_(min=0).sqrt_().div_(area)
    if not cuts:
        return half.mul_(2)
    middle = dv * (du * a4)  # y0.w / A: where the ray is deepest inside
    middle += du * (du * a3 + a1 * .5)
    middle += dv * (dv * a5 + a2 * .5)
    middle.mul_(-part["k"][:, None, None]).div_(area)
    return cut_spans(part, middle - half, middle.add_(half), u, v, cuts)


def cut_spans(part, enter, leave, u, v, cuts):
    """What is left of spans [enter, leave] in the first `cuts` half-spaces n.x <= h, in units of t."""
    k, depth = part["k"][:, None, None], part["depth"][:, None, None]
    for plane in part["cuts"].unbind(1)[:cuts]:
        nu, nv, nw, h = (plane[:, i, None, None] for i in range(4))
        speed = nu * u + (nv * v + nw * SOURCE_DISTANCE)  # n.d
        reach = (nu * u) * -k + (h - nw * depth - k * (nv * v))
        reach.div_(speed)
        leaving = speed > 0
        leave = torch.minimum(leave, torch.where(leaving, reach, math.inf))
        enter = torch.maximum(enter, torch.where(leaving, -math.inf, reach))
    return (leave - enter).clamp_(min=0)


def capsule_spans(part, u, v, du, dv, cuts=0):
    """Length in units of t of each ray inside capsules: two balls each and the cylinder between them."""
    y, w = [], []  # the ray in own space: y + t w
    for i in range(3):
        move = part["mu"][:, i, None, None] * du + part["mv"][:, i, None, None] * dv
        y.append(part["k"][:, None, None] * move)
        w.append(move.add_(part["wc"][:, i, None, None]))
    flat = y[0] * w[0] + y[1] * w[1]
    flat_area = w[0] * w[0] + w[1] * w[1]
    across = y[0] * y[0] + y[1] * y[1] - 1
    area = flat_area + w[2] * w[2]
    enter, leave = torch.full_like(area, math.inf), torch.full_like(area, -math.inf)
    length = part["length"][:, None, None]
    for z in (y[2] - length, y[2] + length):  # the balls
        b = flat + z * w[2]
        half = (b * b - area * (across + z * z)).clamp_(min=0).sqrt_()
        hit = half > 0
        enter = torch.where(hit, torch.minimum(enter, (-b - half) / area), enter)
        leave = torch.where(hit, torch.maximum(leave, (half - b) / area), leave)
    cross = y[0] * w[1] - y[1] * w[0]  # the cylinder: a round wall and a slab
    half = (flat_area - cross * cross).clamp_(min=0).sqrt_()
    slab, reach = -y[2] / w[2], length / w[2].abs()
    first = torch.maximum((-flat - half) / flat_area, slab - reach)
    last = torch.minimum((half - flat) / flat_area, slab + reach)
    hit = (last > first) & (half > 0)
    enter = torch.where(hit, torch.minimum(enter, first), enter)
    leave = torch.where(hit, torch.maximum(leave, last), leave)
    return cut_spans(part, enter, leave, u, v, cuts)


@contextlib.contextmanager
def one_thread():
    """Run on one CPU thread: more slow these many small operations down, and would change the bytes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def project(heads, size, fine=False, device="cpu"):
    """Line integrals through bone, soft tissue and brain, (B, 3, size, size), in cm of full density.

    fine adds sutures and grooves. Exact chords, cone beam.
    Parts of a kind and of similar size in the picture are worked out together as small patches, then added in
    an order that depends on the head alone. Only exactly rounded operations are used: a head gets the same
    bytes in any company.
    """
    g = geometry(heads)
    field = np.array([h.field for h in heads])
    grid = (np.arange(size) + .5) / size * 2 - 1  # pixel centres
    put = lambda x: torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32)).to(device)

    box = boxes(g, field, size)
    height, width = box[..., 1] - box[..., 0], box[..., 3] - box[..., 2]
    extent = np.maximum(height, width)
    extent[(height <= 0) | (width <= 0)] = 0
    if not fine:
        extent[:, FINE] = 0

    sums = torch.zeros(len(heads), len(FILLS), size, size, device=device)
    on_cpu = sums.device.type == "cpu"
    canvas = sums.numpy() if on_cpu else sums  # the same memory; small slices are quicker in numpy
    ladder = sorted({min(size, s) for s in (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, size)})
    needed = ("mu", "mv", "depth", "cuts", "k", "wc", "A", "Q")
    for side, below in zip(ladder, [0] + ladder):
        for capsule, cuts in itertools.product((False, True), range(3)):
            kind = (CAPSULE == capsule) & (CUTS == cuts)
            chosen = np.argwhere((extent > below) & (extent <= side) & kind)  # (n, 2): head and part
            if not len(chosen):
                continue
            chunks = math.ceil(len(chosen) * side ** 2 / 2 ** 17)
            for some in np.array_split(chosen, chunks):
                b, k = some.T
                row, col = np.minimum(box[b, k, 0], size - side), np.minimum(box[b, k, 2], size - side)
                u = field[b, None] * grid[col[:, None] + np.arange(side)]
                v = -field[b, None] * grid[row[:, None] + np.arange(side)]
                du, dv = u - g["uc"][b, k, None], v - g["vc"][b, k, None]
                rays = put(u[:, None, :]), put(v[:, :, None]), put(du[:, None, :]), put(dv[:, :, None])
                part = {name: put(g[name][b, k]) for name in needed}
                part["length"] = put(PARTS["length"][k])
                spans = capsule_spans(part, *rays, cuts) if capsule else ellipsoid_spans(part, *rays, cuts)
                spans = spans.numpy() if on_cpu else spans
                places = zip(b.tolist(), PARTS["fill"][k].tolist(), row.tolist(), col.tolist())
                for span, (head, fill, r, c) in zip(spans, places):
                    canvas[head, fill, r:r + side, c:c + side] += span

    u, v = put(field[:, None] * grid)[:, None, :], put(-field[:, None] * grid)[:, :, None]
    slant = (u * u + v * v + SOURCE_DISTANCE ** 2).sqrt_()  # |d|: from t to cm
    materials = torch.zeros(len(heads), 3, size, size, device=device)
    for fill, weights in enumerate(FILLS.values()):
        for m in np.flatnonzero(weights):
            materials[:, m] += sums[:, fill] * weights[m]
    return (materials * slant[:, None]).clamp_(min=0)


# ------------------------------------------------------------------------------------------------------------
# Physics. Images (B, 1, H, W); transmission is 1 in air.
# The log image p = -ln(transmission) is 0 in air and about 4 behind a head.

ENERGIES = (30, 40, 49.6, 60.6, 74.7)           # keV, five bins for 90 kV, 4 mm Al, a 600 um CsI detector
SPECTRUM = (.118, .227, .239, .285, .131)
# attenuation per cm: bone, soft tissue, brain
MU = ((2.81, 1.32, .840, .605, .468), (.432, .290, .243, .217, .199), (.425, .286, .239, .214, .196))
MU_60 = ((.605,), (.217,), (.217,))             # one energy, brain like soft tissue, as in a simple simulator


@dataclasses.dataclass(frozen=True)
class Physics:
    dose: float                 # quanta per rendered pixel without a head
    full: bool = True           # the real chain: spectrum, scatter, blur, correlated noise, fine bone
    electronic: float = 0.      # noise, in quanta
    scatter: float = 0.         # scattered per primary quantum and unit of log
    width: float = 0.           # of the focal spot and detector blur, in pixels
    coarse: float = 1.          # enhancement: gain of the coarsest band ...
    fine: float = 1.            # ... and of the finest
    rest: float = 1.            # ... and of what is coarser than all bands
    slope: float = .21          # grey levels per unit of p
    air: float = 1.             # grey level of air


PHYSICS = {
    "synthetic-low": Physics(dose=900, full=False, slope=.20),
    "synthetic-high": Physics(dose=5000, full=False, slope=.20),
    "real-low": Physics(
        dose=2000, electronic=3., scatter=.2, width=.9, coarse=2.2, fine=2.3, rest=.20, slope=.44, air=.9),
    "real-normal": Physics(
        dose=15000, electronic=3., scatter=.2, width=.5, coarse=2.2, fine=2.3, rest=.20, slope=.44, air=.9),
    "real-exposure": Physics(
        dose=60000, electronic=3., scatter=.16, width=.4, coarse=.6, fine=4.5, rest=.36, slope=.42, air=.72),
}


def check_domain(domain):
    """Raise ValueError for a name that is no domain."""
    if domain not in DOMAINS:
        raise ValueError(f"unknown domain {domain!r}: choose one of {', '.join(DOMAINS)}")


def each(function, x):
    """function(x), on a CPU image by image: there exp and log round differently at the end of an array."""
    if x.is_cuda or len(x) == 1:
        return function(x)
    return torch.stack([function(image) for image in x])


def blur(x, width):
    """Gaussian blur of (B, 1, H, W), its standard deviation `width` in pixels: a sum of shifted images."""
    if width <= 0:
        return x
    reach = max(1, math.ceil(2.5 * width))
    taps = [math.exp(-.5 * (i / width) ** 2) for i in range(reach + 1)]
    taps = [tap / (2 * sum(taps) - taps[0]) for tap in taps]
    for axis, pad in ((2, (0, 0, reach, reach)), (3, (reach, reach, 0, 0))):
        n, padded = x.shape[axis], F.pad(x, pad, mode="replicate")
        x = x * taps[0]
        for i in range(1, reach + 1):
            x += (padded.narrow(axis, reach - i, n) + padded.narrow(axis, reach + i, n)).mul_(taps[i])
    return x


def smaller(x, factor=2):
    """Means over factor x factor blocks (cut at the lower and right edges)."""
    return F.avg_pool2d(x, factor, ceil_mode=True, count_include_pad=False)


def larger(x, like):
    """Bilinear interpolation of x to the height and width of `like`."""
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)


def randn(heads, size, *stream):
    """Standard normal fields (B, 1, size, size): a CPU generator per head and stream, for any device."""
    seeds = [derive_seed(head.seed, head.prior, *stream) for head in heads]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.randn(1, size, size, generator=generator) for generator in generators])


def fine_bone(bone, heads, exposure=0, strength=1.):
    """Bone path (B, 1, H, W) with trabeculae at two scales and thin curved channels, set per rendered pixel.

    A local mean is taken off: their power is at high frequencies, and a low-pass hardly sees another seed.
    """
    size = bone.shape[-1]
    grain = randn(heads, size, "grain", exposure).to(bone)
    worms = randn(heads, size, "lines", exposure).to(bone)
    fine = grain - blur(grain, .8)
    mid = blur(grain, .7) - blur(grain, 1.2)
    smooth = blur(worms, 1.1)
    lines = each(torch.exp, -(smooth / .05).square())  # zero crossings of a smooth field are thin curves
    lines = lines - blur(lines, 1.5)
    field = .08 * fine + .2 * mid - .2 * lines
    return bone + strength * field * (bone * 1.5 / (bone + 1.5))


def attenuate(materials, mu=MU, spectrum=SPECTRUM):
    """Transmission (B, 1, H, W): Beer-Lambert per energy, P = sum_b w_b exp(-sum_m mu_mb L_m), L in cm."""
    total = 0
    for b, weight in enumerate(spectrum):
        path = sum(materials[:, m:m + 1] * -mu[m][b] for m in range(3))
        total = total + each(torch.exp, path) * (weight / sum(spectrum))
    return total


def add_scatter(p, amount):
    """Primary plus scatter, P + G * (k P (-ln P)), on a coarse grid; G is 3 cm wide: an eighth of a frame."""
    source = p * log_image(p.clamp(min=1e-6)) * amount
    coarse = smaller(source, max(1, p.shape[-1] // 16))
    return p + larger(blur(coarse, 1.8), p)


def add_quantum_noise(rate, dose, white, electronic=0., hiss=0.):
    """Detected signal per incident quantum, (N + sqrt(N) z + e z') / dose with N = dose rate.

    That is the Gaussian limit of Poisson counts; counts stay above 2, for the log.
    white z and hiss z' are standard normal fields like rate (B, 1, H, W); electronic noise e in quanta.
    """
    counts = rate * dose
    return (counts + counts.sqrt() * white + electronic * hiss).clamp_(min=2.) / dose


def log_image(signal):
    """p = -ln(signal): path-like again, 0 in air."""
    return -each(torch.log, signal)


def enhance(p, coarse, fine, rest):
    """Multi-scale enhancement of the log image.

    The bands x of a Laplacian pyramid become gain x (x^2 + e^2)^((q-1)/2), q = .7. That is the compression
    sign(x) |x|^q made smooth at 0. Gains rise from `coarse` (an eighth of the frame) to `fine` (one pixel).
    What is left is multiplied by `rest`, which flattens the brain and leaves the halo round the skin.
    """
    levels = max(1, round(math.log2(max(2, p.shape[-1]))) - 2)
    bands, x = [], p
    for _ in range(levels):
        low = smaller(blur(x, .8))
        bands.append(x - larger(low, x))
        x = low
    x = x * rest
    for i in reversed(range(levels)):
        gain = coarse * (fine / coarse) ** (min(1., (levels - 1 - i) / 3))
        band = bands[i]
        x = larger(x, band) + band * each(lambda b: b ** -.15, band.square() + .25 ** 2) * (.66 * gain)
    return x


def lookup(p, slope, air):
    """Grey level in [-1, 1]: air - slope p, with soft shoulders so that nothing saturates."""
    grey = air - slope * p
    room = 1 - air
    if room > 0:  # halo: above air, below white
        halo = air + room * each(torch.tanh, (grey - air) / room)
        grey = torch.where(grey > air, halo, grey)
    shadow = -.6 - .4 * each(torch.tanh, (-.6 - grey) / .4)
    return torch.where(grey < -.6, shadow, grey).clamp_(-1, 1)


@one_thread()
def picture(materials, heads, domain, noise=True, exposure=0):
    """The physics of one domain: line integrals (B, 3, H, W) of these heads to grey levels (B, 1, H, W)."""
    physics, size = PHYSICS[domain], materials.shape[-1]
    white = hiss = torch.zeros(1, device=materials.device)
    if noise:
        white = randn(heads, size, "quanta", domain, exposure).to(materials)
        hiss = randn(heads, size, "hiss", domain, exposure).to(materials)
    if not physics.full:
        signal = add_quantum_noise(attenuate(materials, MU_60, (1.,)), physics.dose, white)
        return lookup(log_image(signal), physics.slope, physics.air)
    bone = fine_bone(materials[:, :1], heads, exposure)
    primary = attenuate(torch.cat([bone, materials[:, 1:]], 1))
    rate = blur(add_scatter(primary, physics.scatter), physics.width)
    if noise:
        white = blur(white, physics.width)  # the scintillator spreads quanta too
    signal = add_quantum_noise(rate, physics.dose, white, physics.electronic, hiss)
    enhanced = enhance(log_image(signal), physics.coarse, physics.fine, physics.rest)
    return lookup(enhanced, physics.slope, physics.air)


def render(heads, domain, size, noise=True, exposure=0, device="cpu"):
    """The picture of each head in a domain: float32 in [-1, 1], air white.

    (1, size, size) for one Head, (B, 1, size, size) for a list. domain is one name, or one per head.
    noise=False is the truth; exposure > 0 is another exposure, with fresh noise and fresh fine texture.
    """
    if isinstance(heads, Head):
        return render([heads], domain, size, noise, exposure, device)[0]
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"size is {size!r}: it must be a positive whole number of pixels")
    names = [domain] * len(heads) if isinstance(domain, str) else list(domain)
    for name in names:
        check_domain(name)
    if len(names) != len(heads):
        raise ValueError(f"{len(names)} domains for {len(heads)} heads: give one name, or one for each head")
    out = torch.empty(len(heads), 1, size, size, device=device)
    pixels = 2 ** 16 if out.device.type == "cpu" else 2 ** 22  # at once: what a cache or a GPU likes
    together = max(1, pixels // size ** 2)
    for full in (False, True):
        kind = [i for i, name in enumerate(names) if PHYSICS[name].full == full]
        for start in range(0, len(kind), together):
            some = kind[start:start + together]
            materials = project([heads[i] for i in some], size, full, device)
            for name in dict.fromkeys(names[i] for i in some):  # each domain once
                here = [j for j, i in enumerate(some) if names[i] == name]
                mine = [some[j] for j in here]
                out[mine] = picture(materials[here], [heads[i] for i in mine], name, noise, exposure)
    return out


def main(argv=None):
    """python -m minimedshift.phantom FILE: draw each domain's own heads, and one head in all domains."""
    import sys

    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    argv = sys.argv[1:] if argv is None else argv
    usage = "usage: python -m minimedshift.phantom FILE.png"
    if argv in (["-h"], ["--help"]):
        print(usage)
        return 0
    if len(argv) != 1 or not argv[0].lower().endswith(".png"):
        print(usage, file=sys.stderr)
        return 2
    own = [Head(seed, domain) for seed, domain in zip((2, 4, 1, 1, 4), DOMAINS)]
    rows = [("a head of each\ndomain's own", own), ("one head\nin all domains", [Head(37)] * 5)]
    figure, axes = plt.subplots(2, 5, figsize=(12.8, 5.4), layout="constrained")
    for i, (line, (title, heads)) in enumerate(zip(axes, rows)):
        for ax, domain, image in zip(line, DOMAINS, render(heads, DOMAINS, 256)[:, 0]):
            ax.imshow(image, cmap="gray", vmin=-1, vmax=1)
            ax.set(xticks=[], yticks=[], title="" if i else domain)
        line[0].set_ylabel(title)
    figure.supxlabel("Every picture is simulated, those of the real domains too.", fontsize=10)
    try:
        figure.savefig(argv[0], dpi=100, pil_kwargs=dict(optimize=True))
    except OSError as error:
        print(f"error: {argv[0]} cannot be written ({error.strerror})", file=sys.stderr)
        return 2
    print(f"{argv[0]} written")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
