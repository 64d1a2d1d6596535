"""What a head is: a table of ellipsoids and capsules, and how it varies from head to head.

    ELLIPSOIDS, CAPSULES, vault_lines    the parts; `build_parts` makes arrays of them: PARTS
    PRIORS                               how anatomies, poses and frames are drawn, for each population
    Head                                 one anatomy in one pose and frame, from a seed

Head coordinates in cm: x to the side, y to the front, z up; origin at the centre of the cranium."""

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


def plane(degrees):
    """Half-space n.x <= h as an array (nx, ny, nz, h): what is clockwise of a direction from the hinge."""
    ny, nz = -math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    return np.array([0., ny, nz, ny * -1. + nz * -6.6])  # the hinge is at y -1.0, z -6.6


# Four planes hinged on one axis slice the head like a cake, so that flesh is never counted twice:
# vault front | face | neck | vault back. Directions from the hinge, in degrees, lead up, to the skull base,
# from chin to throat, and from occiput to nape. Minus a half-space is the other side of its plane.
BASE = 31
FRONT, BELOW, NECK, OCCIPUT = plane(90), plane(BASE), plane(-46), plane(178)

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
for x, y, w in ((.42, 8.0, .40), (1.15, 7.75, .33), (1.75, 7.25, .36), (2.2, 6.6, .33),
                (2.55, 5.9, .34), (2.85, 5.0, .48), (3.05, 3.9, .46)):
    ELLIPSOIDS += [("teeth", "root", (x, y - .1, -7.2), (.8 * w, .3, 1.1), (5, 0, 0)),
                   ("teeth", "enamel", (x, y, -8.15), (w, .36, .48), (0, 0, 0)),
                   ("jaw", "root", (.93 * x, y - .4, -10.0), (.75 * w, .3, 1.1), (-5, 0, 0)),
                   ("jaw", "enamel", (.93 * x, y - .25, -9.05), (.9 * w, .34, .46), (0, 0, 0))]


def vault_lines():
    """Capsules for sutures in mid-bone (zigzags) and vessel grooves on its inside: thin chains."""
    arc, bend = np.linspace(.02, 1, 10), (1, -1) * 5
    coronal = [(math.sin(a), .28 - .1 * a + .012 * b, math.cos(a)) for a, b in zip(1.75 * arc, bend)]
    lambdoid = [(math.sin(a), -.85 - .15 * a + .015 * b, .55 * math.cos(a)) for a, b in zip(1.2 * arc, bend)]
    sagittal = [(0., math.sin(a), math.cos(a)) for a in np.linspace(.28, -1.05, 11)]
    artery = [[(1., .25 + front * t, -.45 + up * t) for t in np.linspace(0, 1, 6)]
              for front, up in ((.1, 1.2), (-.6, 1.), (-.9, .6))]
    rows = []
    # fill, share of the vault's semi-axes, radius in cm, lines of directions from the vault's centre
    for fill, share, radius, lines in (("suture", .955, .085, (coronal, lambdoid, sagittal)),
                                       ("groove", .935, .11, artery)):
        for line in map(np.array, lines):
            axes = np.where(line[:, 1:2] > 0, VAULT_FRONT, VAULT_BACK)
            norm = [[np.linalg.norm(direction)] for direction in line]  # all at once is not the same bytes
            points = VAULT_CENTRE + share * line / norm * axes
            rows += [("vault", fill, a, b, (radius, radius)) for a, b in zip(points, points[1:])]
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
    The mirror image of a part, if it has one, follows it."""
    parts = []

    def add(group, fill, centre, axes, rotation=np.eye(3), length=0., cuts=(), depth=0.):
        cuts = [*cuts, (0., 0., 0., 1.), (0., 0., 0., 1.)][:2]  # these cut nothing
        for side in (1., -1.) if centre[0] > 0 else (1.,):
            flip = np.diag([side, 1., 1.])
            parts.append(dict(
                group=group, fill=list(FILLS).index(fill), centre=flip @ centre, axes=axes, depth=depth,
                rotation=flip @ rotation @ flip, length=length, cuts=cuts * np.array([side, 1., 1., 1.])))

    add("skin", "flesh", VAULT_CENTRE, VAULT_FRONT, cuts=(FRONT, -BELOW), depth=-1.)
    add("skin", "flesh", VAULT_CENTRE, VAULT_BACK, cuts=(-FRONT, OCCIPUT), depth=-1.)
    add("skin", "flesh", (0., 1.5, -4.8), (6.3, 7.5, 10.2), cuts=(BELOW, -NECK), depth=-1.)
    for fill, depth in VAULT_LAYERS:
        add("vault", fill, VAULT_CENTRE, VAULT_FRONT, cuts=(FRONT, -BELOW), depth=depth)
        add("vault", fill, VAULT_CENTRE, VAULT_BACK, cuts=(-FRONT,), depth=depth)
    for fill, depth in (VAULT_LAYERS[0], VAULT_LAYERS[-1]):  # the two hollows under the temporal lobes
        add("vault", fill, (2.9, 2.4, -4.55), (2.4, 3.6, 1.9), euler(BASE, 0, 0), cuts=(BELOW,), depth=depth)
    for group, fill, centre, axes, tilt, *ends in ELLIPSOIDS:
        normals = [np.array(end) / np.linalg.norm(end) for end in ends]
        cuts = [(*n, n @ np.add(centre, end)) for n, end in zip(normals, ends)]
        add(group, fill, centre, axes, euler(*tilt), cuts=cuts)
    for group, fill, a, b, radii in CAPSULES + vault_lines():
        distance = np.linalg.norm(np.subtract(b, a))
        along = np.subtract(b, a) / distance
        sideways = (0., 1., 0.) if abs(along[0]) > .9 else (1., 0., 0.)          # not parallel to the capsule
        across = np.cross(sideways, along)
        across /= np.linalg.norm(across)
        rotation = np.stack([np.cross(across, along), across, along], 1)
        cuts = (NECK, -OCCIPUT) if fill == "flesh" else ()
        add(group, fill, np.add(a, b) / 2, (*radii, radii[0]), rotation, distance / 2 / radii[0], cuts)
    return {key: np.array([part[key] for part in parts]) for key in parts[0]}


PARTS = build_parts()
CUTS = (PARTS["cuts"][:, :, :3] != 0).any(2).sum(1)     # (K,) how many half-spaces cut each part
FINE = PARTS["fill"] >= list(FILLS).index("suture")     # (K,) fine lines

# Angles are in degrees, lengths in cm. A pair is (mean, spread) unless said otherwise.
SHARED = dict(  # the population that all domains share
    # (weight, mean, spread) of the turn about the long axis: 0 frontal, +-90 lateral
    turns=((.3, 0, 10), (.12, 90, 6), (.12, -90, 6), (.25, 45, 15), (.21, -45, 15)),
    tilt=(0, 11),           # cranial (+) or caudal (-) angle
    roll=(0, 14),           # in the image plane
    field=(10., 12.5),      # half the side of the frame, lowest and highest
    shift=.9,               # spread of the head's place in the frame
    skin=(.35, 1.1),        # thickness of the scalp, lowest and highest
    ears=.5,                # probability of ears
    spread=1.)              # of the anatomy, 1 = human range
SYNTHETIC = dict(turns=((1., 0, 14),), tilt=(-3, 8), roll=(4, 11), field=(10.5, 12.5), shift=1.1,
                 skin=(.5, 1.2), ears=.9, spread=1.2)
REAL = dict(turns=((.7, -58, 17), (.3, 58, 17)), tilt=(3, 9), roll=(14, 14), field=(9.8, 11.5), shift=1.,
            skin=(.3, .8), ears=.2, spread=.7)
PRIORS = {  # a domain without a line has the population that all share
    None: SHARED,
    "synthetic-low": SYNTHETIC,
    "synthetic-high": SYNTHETIC | dict(roll=(-6, 10), tilt=(-6, 8)),
    "real-low": REAL,
    "real-normal": REAL,
    "real-exposure": REAL | dict(roll=(4, 9), shift=.5, field=(10., 11.5)),
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
        matrix, centre, cuts = vary(np.random.default_rng(derive_seed(person, "anatomy", prior)), drawn)

        rng = np.random.default_rng(derive_seed(self.seed, "view", prior))
        normal = lambda *shape: np.clip(rng.standard_normal(shape), -2, 2)
        weights = [weight for weight, _, _ in drawn["turns"]]
        _, *turn = drawn["turns"][rng.choice(len(weights), p=weights)]
        angles = turn, drawn["tilt"], drawn["roll"]
        self.view = tuple(mean + spread * float(normal()) for mean, spread in angles)
        self.field = float(rng.uniform(*drawn["field"]))

        # from head to camera coordinates: the anatomy is turned, tilted, rolled and put into the frame
        turn, tilt, roll = self.view
        upright = np.array([[1., 0, 0], [0, 0, 1.], [0, 1., 0]])  # (x, y, z) -> (u, v, depth), frontal view
        pose = euler(0, 0, roll) @ euler(tilt, 0, 0) @ upright @ euler(0, 0, turn)
        move = np.array([*normal(2) * drawn["shift"], 0.]) - pose @ (0., .8, -3.)  # this is mid-frame
        cuts[:, :, :3] = cuts[:, :, :3] @ pose.T
        cuts[:, :, 3] += cuts[:, :, :3] @ move
        self.matrix, self.centre, self.cuts = matrix @ pose.T, centre @ pose.T + move, cuts


def vary(rng, prior):
    """Draw one anatomy: the parts' matrix (K, 3, 3), centre (K, 3), cuts (K, 2, 4); head coordinates, cm."""
    p, spread = PARTS, prior["spread"]
    pair = np.cumsum(p["centre"][:, 0] >= 0) - 1  # a part and its mirror image vary together
    normal = lambda *shape: np.clip(rng.standard_normal(shape), -2.2, 2.2)
    rigid = np.isin(p["group"], ("vault", "skin"))[:, None]  # nested surfaces must stay nested

    shift = .07 * spread * normal(pair[-1] + 1, 3)[pair]
    shift[:, 0] *= np.sign(p["centre"][:, 0])  # only the next line moves a part in the middle to a side
    shift += .02 * spread * normal(len(pair), 3)
    axes = p["axes"] * np.exp(.06 * spread * normal(pair[-1] + 1, 3)[pair] * ~rigid)
    centre = p["centre"] + shift * ~rigid

    thickness = np.array([.45, .55, .55]) * math.exp(.12 * spread * normal())   # side, front and back, top
    depth = p["depth"][:, None]
    axes = axes - np.maximum(depth, 0) * thickness + np.maximum(-depth, 0) * rng.uniform(*prior["skin"])
    axes[p["group"] == "ear"] *= 1. if rng.random() < prior["ears"] else 1e-3

    rotation = p["rotation"]
    for group, pivot, angle in (("jaw", (0, .4, -5.3), -spread * rng.uniform(0, 9)),   # it opens
                                ("neck", (0, -1., -7.), 7 * spread * normal())):       # the head nods
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
