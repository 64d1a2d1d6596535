"""What a head is: a table of ellipsoids and capsules, and how it varies from head to head.

    ELLIPSOIDS, CAPSULES, vault_lines    the parts; `build_parts` makes arrays of them: PARTS
    PRIORS                               how anatomies, poses and frames are drawn, for each population
    Head                                 one anatomy in one pose and frame, from a seed

Head coordinates in cm: x to the side, y to the front, z up; origin at the centre of the cranium."""

import dataclasses
import math

import numpy as np

# Overlaps add: the density of a material at a point is the sum over all parts that contain the point. So a
# hollow is a part with negative density. Each kind of part adds (bone, soft tissue, brain), 1 = full density.
FILLS = {
    "flesh": (0., 1., 0.), "fat": (0., -.4, 0.), "air": (0., -1., 0.),
    "skull": (1., -1., 0.), "diploe": (-.7, 0., 0.), "table": (.7, 0., 0.), "brain": (-1., 0., 1.),
    "bone": (.8, -.7, 0.), "hollow": (-.8, .7, 0.), "cortex": (1.15, -1., 0.),
    "sinus": (-.8, -.3, 0.), "void": (-.6, 0., 0.),
    "petrous": (.9, 0., -.9), "root": (.5, -.4, 0.), "enamel": (.9, -.1, 0.),
    "suture": (-.55, 0., 0.), "groove": (-.4, 0., 0.),      # these fine lines are in the real domains only
}
FILL_NAMES = tuple(FILLS)

# Four planes hinged on one axis slice the head like a cake, so that flesh is never counted twice:
# vault front | face | neck | vault back. Directions from the hinge, in degrees, lead to the skull base, from
# chin to throat, and from occiput to nape.
HINGE = (-1.0, -6.6)
BASE, THROAT, NAPE = 31.0, -46.0, 178.0


def plane(degrees, side):
    """Half-space n.x <= h as (nx, ny, nz, h) from the hinge on; side +1 keeps what is clockwise of it."""
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
NO_CUT = (0., 0., 0., 1.)

# The vault is two half ellipsoids, long in front, short behind, widest at the parietal bones where they meet.
# A layer is a fill and its depth, a share of the bone's thickness.
VAULT_CENTRE, VAULT_FRONT, VAULT_BACK = (0., -1., 0.), (7.1, 9.5, 7.0), (7.1, 8.3, 7.0)
VAULT_LAYERS = (("skull", 0.), ("diploe", .27), ("table", .75), ("brain", 1.))

# An ellipsoid is group, fill, centre, semi-axes, tilt in degrees about x, y, z, and up to two vectors: what
# lies beyond centre + vector is cut off. A part with x > 0 comes with its mirror image.
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

# A capsule is group, fill, one end, other end, radii (sideways, across).
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

for i in range(5):  # the neck's vertebrae: body, lateral mass, lamina, spinous and transverse process
    y, z = -1.2 + .12 * i, -8.3 - 1.65 * i
    ELLIPSOIDS += [("neck", "bone", (0, y, z), (1.15, .85, .62), (0, 0, 0)),
                   ("neck", "bone", (1.5, y - .9, z), (.65, .75, .5), (0, 0, 0))]
    CAPSULES += [("neck", "bone", (1.5, y - 1.5, z), (.2, y - 2.8, z - .3), (.25, .4)),
                 ("neck", "bone", (0, y - 2.8, z - .3), (0, y - 4.3, z - .9), (.22, .35)),
                 ("neck", "bone", (1.5, y - .5, z), (2.5, y - .6, z - .1), (.3, .3))]

# 28 teeth along the dental arch, each a root and an enamel crown, at x, y, with this half width
ARCH = ((.42, 8.0, .40), (1.15, 7.75, .33), (1.75, 7.25, .36), (2.2, 6.6, .33),
        (2.55, 5.9, .34), (2.85, 5.0, .48), (3.05, 3.9, .46))
for x, y, w in ARCH:
    ELLIPSOIDS += [("teeth", "root", (x, y - .1, -7.2), (.8 * w, .3, 1.1), (5, 0, 0)),
                   ("teeth", "enamel", (x, y, -8.15), (w, .36, .48), (0, 0, 0)),
                   ("jaw", "root", (.93 * x, y - .4, -10.0), (.75 * w, .3, 1.1), (-5, 0, 0)),
                   ("jaw", "enamel", (.93 * x, y - .25, -9.05), (.9 * w, .34, .46), (0, 0, 0))]


def on_vault(direction, share):
    """The point that lies in this direction, at a share of the vault's semi-axes."""
    axes = VAULT_FRONT if direction[1] > 0 else VAULT_BACK
    return VAULT_CENTRE + share * direction / np.linalg.norm(direction) * axes


def vault_lines():
    """Capsules for sutures in mid-bone (zigzags) and vessel grooves on its inside: thin chains."""
    angles = np.linspace(.02, 1, 10)
    coronal = [(math.sin(a), .28 - .1 * a, math.cos(a)) for a in 1.75 * angles]
    lambdoid = [(math.sin(a), -.85 - .15 * a, .55 * math.cos(a)) for a in 1.2 * angles]
    sagittal = [(0., math.sin(a), math.cos(a)) for a in np.linspace(.28, -1.05, 11)]
    # fill, share of the vault's semi-axes, radius in cm, zigzag, points
    lines = [("suture", .955, .085, .012, coronal), ("suture", .955, .085, .015, lambdoid),
             ("suture", .955, .085, 0., sagittal)]
    for front, up in ((.1, 1.2), (-.6, 1.), (-.9, .6)):                          # branches of an artery
        branch = [(1., .25 + front * t, -.45 + up * t) for t in np.linspace(0, 1, 6)]
        lines.append(("groove", .935, .11, 0., branch))
    rows = []
    for fill, share, radius, zigzag, points in lines:
        for i, (start, end) in enumerate(zip(points, points[1:])):
            move = (0, (-1) ** i * zigzag, 0)
            a, b = on_vault(np.add(start, move), share), on_vault(np.subtract(end, move), share)
            rows.append(("vault", fill, a, b, (radius, radius)))
    return rows


def euler(x, y, z):
    """Rotation matrix (3, 3) for angles in degrees about x, then y, then z."""
    cx, cy, cz = np.cos(np.radians([x, y, z]))
    sx, sy, sz = np.sin(np.radians([x, y, z]))
    return np.array([[cz * cy, cz * sy * sx - sz * cx, cz * sy * cx + sz * sx],
                     [sz * cy, sz * sy * sx + cz * cx, sz * sy * cx - cz * sx],
                     [-sy, cy * sx, cy * cx]])


def build_parts():
    """All K parts as a dict of arrays (K, ...), which `Head` varies and poses.
    Part k is {x : y = axes^-1 rotation^T (x - centre) is within distance 1 of the segment |y_z| <= length},
    cut by up to two half-spaces n.x <= h. length 0 is an ellipsoid.
    The mirror image of a part follows it; both have the same `pair`, so that they vary together."""
    parts = []

    def add(group, fill, centre, axes, rotation, length=0., cuts=(), depth=0.):
        cuts = (*cuts, NO_CUT, NO_CUT)[:2]
        pair = parts[-1]["pair"] + 1 if parts else 0
        for side in (1., -1.) if centre[0] > 0 else (1.,):
            flip = np.diag([side, 1., 1.])
            parts.append(dict(
                group=group, fill=FILL_NAMES.index(fill), centre=flip @ centre, axes=axes,
                rotation=flip @ rotation @ flip, length=length, cuts=cuts * np.array([side, 1., 1., 1.]),
                depth=depth, pair=pair, side=side))

    straight = np.eye(3)
    add("skin", "flesh", VAULT_CENTRE, VAULT_FRONT, straight, cuts=(FRONT, ABOVE), depth=-1.)
    add("skin", "flesh", VAULT_CENTRE, VAULT_BACK, straight, cuts=(BACK, OCCIPUT), depth=-1.)
    add("skin", "flesh", (0., 1.5, -4.8), (6.3, 7.5, 10.2), straight, cuts=(BELOW, FACE), depth=-1.)
    for fill, depth in VAULT_LAYERS:
        add("vault", fill, VAULT_CENTRE, VAULT_FRONT, straight, cuts=(FRONT, ABOVE), depth=depth)
        add("vault", fill, VAULT_CENTRE, VAULT_BACK, straight, cuts=(BACK,), depth=depth)
    for fill, depth in (VAULT_LAYERS[0], VAULT_LAYERS[-1]):  # the two hollows under the temporal lobes
        add("vault", fill, (2.9, 2.4, -4.55), (2.4, 3.6, 1.9), euler(BASE, 0, 0), cuts=(BELOW,), depth=depth)
    for group, fill, centre, axes, tilt, *ends in ELLIPSOIDS:
        add(group, fill, centre, axes, euler(*tilt), cuts=[beyond(centre, end) for end in ends])
    for group, fill, a, b, radii in CAPSULES + vault_lines():
        a, b = np.array(a, float), np.array(b, float)
        distance = np.linalg.norm(b - a)
        along = (b - a) / distance
        sideways = (0., 1., 0.) if abs(along[0]) > .9 else (1., 0., 0.)          # not parallel to the capsule
        across = np.cross(sideways, along)
        across /= np.linalg.norm(across)
        rotation = np.stack([np.cross(across, along), across, along], 1)
        cuts = (NECK, NUCHAL) if fill == "flesh" else ()
        add(group, fill, (a + b) / 2, (*radii, radii[0]), rotation, distance / 2 / radii[0], cuts)
    return {key: np.array([part[key] for part in parts]) for key in parts[0]}


PARTS = build_parts()
CUTS = (PARTS["cuts"][:, :, :3] != 0).any(2).sum(1)     # (K,) how many half-spaces cut each part
FINE = PARTS["fill"] >= FILL_NAMES.index("suture")      # (K,) fine lines

# Angles are in degrees, lengths in cm. A pair is (mean, spread) unless said otherwise.

@dataclasses.dataclass(frozen=True)
class Prior:
    """How one population is drawn. The defaults are the population that all domains share."""
    # (weight, mean, spread) of the turn about the long axis: 0 frontal, +-90 lateral
    turns: tuple = ((.3, 0, 10), (.12, 90, 6), (.12, -90, 6), (.25, 45, 15), (.21, -45, 15))
    tilt: tuple = (0, 11)           # cranial (+) or caudal (-) angle
    roll: tuple = (0, 14)           # in the image plane
    field: tuple = (10., 12.5)      # half the side of the frame, lowest and highest
    shift: float = .9               # spread of the head's place in the frame
    skin: tuple = (.35, 1.1)        # thickness of the scalp, lowest and highest
    ears: float = .5                # probability of ears
    spread: float = 1.              # of the anatomy, 1 = human range


SYNTHETIC = Prior(
    turns=((1., 0, 14),), tilt=(-3, 8), roll=(4, 11),
    field=(10.5, 12.5), shift=1.1, skin=(.5, 1.2), ears=.9, spread=1.2)
REAL = Prior(
    turns=((.7, -58, 17), (.3, 58, 17)), tilt=(3, 9), roll=(14, 14),
    field=(9.8, 11.5), shift=1., skin=(.3, .8), ears=.2, spread=.7)
PRIORS = {  # a domain without a line has the population that all share
    None: Prior(),
    "synthetic-low": SYNTHETIC,
    "synthetic-high": dataclasses.replace(SYNTHETIC, roll=(-6, 10), tilt=(-6, 8)),
    "real-low": REAL,
    "real-normal": REAL,
    "real-exposure": dataclasses.replace(REAL, roll=(4, 9), shift=.5, field=(10., 11.5)),
}


def derive_seed(*keys):
    """A 63-bit seed from integers and strings, the same on every machine (FNV-1a with a final mix)."""
    state = 0xCBF29CE484222325
    for byte in repr(keys).encode():
        state = (state ^ byte) * 0x100000001B3 % 2**64
    state = (state ^ state >> 31) * 0x9E3779B97F4A7C15 % 2**64
    return (state ^ state >> 29) >> 1


def population(seed, domain, shift):
    """The population of a training head: the domain for a share `shift` of seeds, else None."""
    own = derive_seed(seed, "population") < shift * 2**63
    return domain if own and domain in PRIORS else None


class Head:
    """One anatomy, pose and frame, a function of (seed, prior, anatomy).

    prior: a domain, for its own population, or None for the one that all domains share.
    anatomy: the seed of the body, if it is another person's in this head's view.
    matrix (K, 3, 3) takes camera space to each part's own space, centre (K, 3), cuts (K, 2, 4).
    field: half the frame's side. view: turn, tilt, roll in degrees. Camera coordinates are in cm: (u, v) is
    the pixel's place in the isocentre plane, and the third axis points away from the source."""

    def __init__(self, seed, prior=None, anatomy=None):
        self.seed, self.prior = int(seed), prior  # numpy integers would hash differently
        person = self.seed if anatomy is None else int(anatomy)
        drawn = PRIORS[prior]
        body = vary(np.random.default_rng(derive_seed(person, "anatomy", prior)), drawn)

        rng = np.random.default_rng(derive_seed(self.seed, "view", prior))
        normal = lambda *shape: np.clip(rng.standard_normal(shape), -2, 2)
        weights = [weight for weight, _, _ in drawn.turns]
        _, *turn = drawn.turns[rng.choice(len(weights), p=weights)]
        self.view = tuple(mean + spread * float(normal()) for mean, spread in (turn, drawn.tilt, drawn.roll))
        self.field = float(rng.uniform(*drawn.field))
        self.matrix, self.centre, self.cuts = place(*body, self.view, normal(2) * drawn.shift)


def vary(rng, prior):
    """Draw one anatomy: the parts' matrix (K, 3, 3), centre (K, 3), cuts (K, 2, 4); head coordinates, cm."""
    p, spread = PARTS, prior.spread
    count, pairs = len(p["pair"]), p["pair"][-1] + 1
    normal = lambda *shape: np.clip(rng.standard_normal(shape), -2.2, 2.2)
    rigid = np.isin(p["group"], ("vault", "skin"))[:, None]  # nested surfaces must stay nested

    mirror = np.stack([p["side"], np.ones(count), np.ones(count)], 1)
    shift = .07 * spread * normal(pairs, 3)[p["pair"]] * mirror
    shift[p["centre"][:, 0] == 0, 0] = 0  # only the next line moves a part in the middle to a side
    shift = shift + .02 * spread * normal(count, 3)
    axes = p["axes"] * np.exp(.06 * spread * normal(pairs, 3)[p["pair"]] * ~rigid)
    centre = p["centre"] + shift * ~rigid

    thickness = np.array([.45, .55, .55]) * math.exp(.12 * spread * normal())   # side, front and back, top
    skin = rng.uniform(*prior.skin)
    depth = p["depth"][:, None]
    axes = axes - np.maximum(depth, 0) * thickness + np.maximum(-depth, 0) * skin
    axes[p["group"] == "ear"] *= 1. if rng.random() < prior.ears else 1e-3

    rotation = p["rotation"]
    opening = rng.uniform(0, 9) * spread
    nod = 7 * spread * normal()
    for group, pivot, angle in (("jaw", (0, .4, -5.3), -opening), ("neck", (0, -1., -7.), nod)):
        turn = euler(angle, 0, 0)
        mine = p["group"] == group
        centre[mine] = (centre[mine] - pivot) @ turn.T + pivot
        rotation = np.where(mine[:, None, None], turn @ rotation, rotation)

    # Faces are long or short, broad or narrow. The cuts of the face move with their part.
    face = np.isin(p["group"], ("face", "jaw", "teeth"))[:, None]
    stretch = 1 + (np.array([.03, 0., .09]) + spread * np.array([.04, .0, .05]) * normal(3)) * face
    centre = (centre - (0, 0, -2.)) * stretch + (0, 0, -2.)
    moved = face * (centre - p["centre"])
    cuts = p["cuts"].copy()
    cuts[:, :, 3] += (cuts[:, :, :3] * moved[:, None]).sum(2)

    size = 1 + spread * (.035 * normal(3) + .02 * normal(1))
    matrix = np.swapaxes(rotation, 1, 2) / axes[:, :, None] / (size * stretch)[:, None, :]
    cuts[:, :, :3] /= size
    return matrix, centre * size, cuts


def place(matrix, centre, cuts, view, shift):
    """Turn, tilt and roll an anatomy and put it into the frame: head to camera coordinates, shapes kept."""
    turn, tilt, roll = view
    upright = np.array([[1., 0, 0], [0, 0, 1.], [0, 1., 0]])  # (x, y, z) -> (u, v, depth) of a frontal view
    pose = euler(0, 0, roll) @ euler(tilt, 0, 0) @ upright @ euler(0, 0, turn)
    middle = pose @ np.array([0., .8, -3.0])  # what the frame is centred on
    move = np.array([*shift, 0.]) - middle
    cuts = cuts.copy()
    cuts[:, :, :3] = cuts[:, :, :3] @ pose.T
    cuts[:, :, 3] += cuts[:, :, :3] @ move
    return matrix @ pose.T, centre @ pose.T + move, cuts
