"""Translate X-ray images from one domain to another: `python translate.py INPUT OUTPUT --source DOMAIN --target DOMAIN`.

INPUT is an image or a folder of them (sub-folders are kept); OUTPUT gets the same names, sizes, modes and bit depths. Colour comes back grey
from a network trained on grey images.
--source auto infers the domain of each image. Where the checkpoint holds a student, it translates, in one evaluation; --method flow, or a
flag of the flow such as --tau, takes the flow. Without arguments, held-out simulated heads are translated into a figure beside the checkpoint.

An image is translated at the working size: its shorter side is brought to the size the network was trained at, so
that the head is framed as in training. The change is then carried to full resolution: in every small window of the
working image a line is fitted from grey value to change, the lines are spread smoothly over the full image and
applied to its own pixels, so that the source's fine detail stays and no seam appears. An image of exactly the training size is
translated as it is.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from minimedshift import sampler, student
from minimedshift.measure import metrics
from minimedshift.phantom import sets
from minimedshift.support import domain, film, images
from minimedshift.support.command import UserError, flag, parse, run
from minimedshift.support.carry import carry, resize, working_shape
from minimedshift.support.checkpoint import load_model
from minimedshift.evaluate import TAUS, main_domains
from minimedshift.flow import draw_noise
from minimedshift.support.log import progress
from minimedshift.support.machine import can_compile, in_batches, keep_memory, pick_device


@dataclass(frozen=True)
class Config:
    input: str = flag(None, "an image, or a folder of images", "positional")
    output: str = flag(None, "where the translation goes: a file for a file, a folder for a folder", "positional")
    source: str = flag(None, "domain of INPUT, or auto: inferred for each image", "what")
    target: str = flag(None, "domain to translate to", "what")
    checkpoint: str = flag("out/checkpoint.pt", "trained network; its EMA weights are used", "what")
    method: str = flag(None, "who translates (default: the student, if there is one and no flag of the flow is given)", "how", choices=("student", "flow"))
    tau: float = flag(None, "how far back to go, below end: near 1 keeps structure, near 0 favours realism (default: the checkpoint's)",
                      "how", kind=float, low=0, below=1)
    guidance: float = flag(None, "strength of the target label on the way forward; 1 is none (default: the checkpoint's)", "how",
                           kind=float, above=-1000, below=1000)
    steps: int = flag(None, "solver steps of each leg (default: the checkpoint's)", "how", kind=int, low=1)
    solver: str = flag(None, "ODE solver, or sde: a diffusion with the same images at every t (default: the checkpoint's)", "how",
                       choices=tuple(sampler.SOLVERS))
    end: float = flag(None, "time at which an image is taken to be, above tau (default: the checkpoint's)", "how", kind=float,
                      above=0, high=1)
    seed: int = flag(0, "of all noise: what the student adds where the target has more, --source auto, --solver sde", "how")
    batch_size: int = flag(0, "images translated at once; 0: 16 on a CPU, 256 on a GPU; halved where memory does not do", "machine", low=0)
    device: str = flag("auto", "where to compute", "machine", choices=("auto", "cuda", "mps", "cpu"))
    overwrite: bool = flag(False, "replace existing files", "files")
    compare: str = flag(None, "also write this picture: source | translation | difference, of the first 8 images", "files")
    trajectory: str = flag(None, "also write this picture: the first 8 images on their way to tau and up again", "files")
    uncertainty: str = flag(None, "also write this picture: where --samples translations differ; no error map", "files")
    samples: int = flag(None, "translations of an image behind --uncertainty (default: 8)", "files", kind=int, low=2)


FLOW = ("tau", "guidance", "steps", "solver", "end", "trajectory", "uncertainty")  # flags that the student has no use for
PICTURES = ("compare", "trajectory", "uncertainty")  # drawn if asked for


# ---------------------------------------------------------------- flags and files, checked before any work

def check_flags(c):
    """Raises UserError for flags that do not go together."""
    if c.input and not (c.output and c.source and c.target):
        raise UserError("to translate INPUT, give OUTPUT, --source (a domain, or auto) and --target too")
    for name in PICTURES:
        if getattr(c, name) and not c.input:
            raise UserError(f"--{name} needs INPUT and OUTPUT")
    if c.samples and not c.uncertainty:
        raise UserError("--samples needs --uncertainty FILE, the picture that is drawn from them")


def pick_method(c, state):
    """"student" or "flow"."""
    given = [name for name in FLOW if getattr(c, name) is not None]
    if c.method == "student" and given:
        raise UserError(f"--{given[0]} is a flag of the flow, the student has no use for it: leave it out, or say --method flow")
    if c.method == "student" and not state.get("student"):
        raise UserError(f"{c.checkpoint} has no student: `python train.py --resume` teaches one")
    return c.method or ("student" if state.get("student") and not given else "flow")


def plan_files(c):
    """[(input file, output file)], or UserError: nothing is written over unless --overwrite, and never INPUT by surprise."""
    source, target = Path(c.input), Path(c.output)
    if source.is_dir():
        if target.is_file():
            raise UserError(f"INPUT {source} is a folder but OUTPUT {target} is a file")
        if source.resolve() in target.resolve().parents:
            raise UserError(f"OUTPUT {target} lies inside INPUT {source}, so its files would be taken for inputs: choose a folder outside")
        files = [(path, target / path.relative_to(source)) for path in images.image_files(source)]
        if not files:
            raise UserError(f"INPUT {source} has no image files ({' '.join(images.FORMATS)})")
    else:
        if not source.is_file():
            raise UserError(f"INPUT {source}: there is no such file or folder")
        if target.is_dir():
            raise UserError(f"INPUT {source} is a file but OUTPUT {target} is a folder: name the file, for example {target / source.name}")
        files = [(source, target)]
    outputs = [path for _, path in files]
    taken = {path.resolve() for pair in files for path in pair}
    for name in PICTURES:
        if picture := getattr(c, name):
            if Path(picture).resolve() in taken:
                raise UserError(f"--{name} {picture} is also another picture or image: choose another name")
            taken.add(Path(picture).resolve())
            outputs.append(Path(picture))
    for path in outputs:
        if path.suffix.lower() not in images.FORMATS:
            raise UserError(f"{path}: an image file ends in one of {' '.join(images.FORMATS)}")
        if path.is_dir():
            raise UserError(f"{path} is a folder, where an image should be written")
    there = [path for path in outputs if path.exists()]
    if there and not c.overwrite:
        others = f" and {len(there) - 1} more" if len(there) > 1 else ""
        raise UserError(f"{there[0]}{others} would be replaced: choose another name, or say --overwrite")
    for folder in {path.parent for path in outputs}:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"the folder {folder} cannot be made ({error.strerror})") from None
    return files


# ---------------------------------------------------------------- files in, files out

def translate_batch(items, model, translator, state, c, how, device, pictures):
    """Translate [(input, output, x, info)] of one working shape, write them and add them to `pictures`."""
    channels, domains = state["image"]["channels"], state["domains"]
    full = [images.channels_to(x, channels)[None] for _, _, x, _ in items]  # on the host: together they may be large
    shape = working_shape(*full[0].shape[-2:], state["image"]["size"], model.stride)
    x1 = torch.cat([resize(x.to(device), shape) for x in full])
    y_source = domain.sources(x1, [path for path, *_ in items], model, state, c.source, c.target, c.seed)
    y_target, draw = torch.full_like(y_source, domains.index(c.target)), torch.Generator(device).manual_seed(c.seed)
    if translator:
        one = lambda i: translator(x1[i], y_source[i], y_target[i], c.seed)
    else:
        one = lambda i: sampler.translate(model, x1[i], y_source[i], y_target[i], **how, generator=draw)
    out = in_batches(one, torch.arange(len(x1), device=device), len(x1))
    changed = []
    for (source, path, x, info), large, small, new in zip(items, full, x1, out):
        if large.shape[-2:] != shape:
            new = carry(large.to(device), small[None], new[None])[0]
        images.write_image(path, new, info)
        changed.append((source.name, large[0], new.clamp(-1, 1).cpu()))
    pictures.add(changed, x1, y_source, y_target, out)


def translate_files(files, model, translator, state, c, how, device):
    """Translate all files, those of one working shape together; returns the exit status."""
    waiting, bad, done, start = {}, 0, 0, time.time()
    pictures = film.Pictures(c, model, how, state["domains"])

    def flush(shape):
        nonlocal done
        batch = waiting.pop(shape)
        translate_batch(batch, model, translator, state, c, how, device, pictures)
        done += len(batch)
        if len(files) > 1:
            progress(done, len(files) - bad, start, "translating")
        else:
            print(f"{batch[0][1]} written")

    for path, output in files:
        try:
            x, info = images.read_image(path)
            images.check_writable(output, info)
        except UserError as error:
            if len(files) == 1:
                raise
            bad += 1
            print(f"error: {error}", file=sys.stderr)
            continue
        shape = working_shape(*info.size, state["image"]["size"], model.stride)
        waiting.setdefault(shape, []).append((path, output, x, info))
        if len(waiting[shape]) == (c.batch_size or (256 if device.type == "cuda" else 16)):
            flush(shape)
    for shape in list(waiting):
        flush(shape)
    pictures.write()
    if bad:
        print(f"{bad} of {len(files)} images could not be read; the others are done", file=sys.stderr)
    return 2 if bad else 0


# ---------------------------------------------------------------- no arguments: held-out simulated heads

def translate_heads(model, translator, state, c, how, device, heads=8):
    """Write translate.png beside the checkpoint: source | translations at several tau | the student's | truth, of test heads."""
    config, domains = state["config"], list(state["domains"])
    test = sets.paired_heads(state["image"]["size"], config["test_heads"], "test", config["seed"], decoys=sets.DECOYS)
    source, target = main_domains(domains, c.source, c.target)
    column = [sets.phantom.DOMAINS.index(name) for name in domains]  # of each of the network's domains in the test set
    load = lambda array, d: torch.from_numpy(array[:heads, column[d]].astype("float32")).to(device)
    x1, truth = load(test.images, source), load(test.truth, target)
    score = lambda x: f"{metrics.structure(x, truth).mean():.1f} dB"
    pictures, captions = [x1], [f"source, {score(x1)}\n{domains[source]}"]
    taus = [] if c.method == "student" else [how["tau"]] if c.tau is not None or how["x0"] == "image" else sorted(tau for tau in {*TAUS, how["tau"]} if tau < how["end"])
    for tau in taus:
        out = sampler.translate(model, x1, source, target, **{**how, "tau": tau}, generator=torch.Generator(device).manual_seed(c.seed))
        pictures.append(out)
        name = "directly" if how["x0"] == "image" else f"tau {tau:g}"
        captions.append(f"{name}, {score(out)}" + ("\n(default)" if tau == state["translate"]["tau"] and len(taus) > 1 and not translator else ""))
    if translator:
        pictures.append(translator(x1, source, target, c.seed))
        captions.append(f"student, {score(pictures[-1])}\n(default)")
    path = Path(c.checkpoint).parent / "translate.png"
    images.figure(path, [list(row) for row in zip(*(x.cpu() for x in pictures + [truth]))],
                captions + [f"simulated truth\n{domains[target]}"], [f"head {i}" for i in range(len(x1))])
    print(f"{path}: simulated test heads; dB is the structure PSNR against the simulated truth, mean of the {len(x1)} heads shown")
    return 0


# ---------------------------------------------------------------- the command

def main(argv=None):
    c = parse(Config, __doc__, argv)
    check_flags(c)
    device = pick_device(c.device)
    keep_memory()
    model, state = load_model(c.checkpoint, device)
    for name in ("source", "target"):
        if name == "source" and c.source == "auto" and not c.input:
            raise UserError("--source auto needs INPUT: held-out heads are translated from a domain that is known")
        allowed = list(state["domains"]) + ["auto"] * (name == "source" and c.input is not None)
        if getattr(c, name) not in allowed + [None]:
            raise UserError(f"--{name} {getattr(c, name)} is not a domain of {c.checkpoint}: choose from {', '.join(allowed)}")
    if state["translate"]["x0"] == "image":
        for name, given in (("--tau", c.tau is not None), ("--end", c.end is not None),
                            ("--source auto", c.source == "auto"), ("--solver sde", c.solver == "sde"),
                            ("--uncertainty", c.uncertainty)):
            if given:
                raise UserError(f"{name} has no meaning for {c.checkpoint}, which goes from image to image directly (--x0 image)")
    if c.solver == "sde" and not (state["shape"]["score"] or (state["config"]["coupling"] == "independent" and state["config"]["sigma"] == 0)):
        raise UserError(f"--solver sde needs a score, and {c.checkpoint} has none: train with --score, or with --coupling independent and --sigma 0")
    if c.uncertainty and state["config"]["sigma"]:
        raise UserError(f"--uncertainty needs a network trained with --sigma 0, and {c.checkpoint} is not")
    method = pick_method(c, state)
    translator = student.restore(state["student"], device, c.checkpoint) if method == "student" else None
    if not c.input and state["config"].get("data"):
        raise UserError("this network was trained on your own images: give INPUT, OUTPUT, --source and --target")
    files = plan_files(c) if c.input else []
    if can_compile(device) and len(files) >= 100:  # fewer are done sooner without
        model.compile_blocks(dynamic=True)

    how = {key: default if getattr(c, key, None) is None else getattr(c, key) for key, default in state["translate"].items()}
    if not how["tau"] < how["end"] <= 1:
        raise UserError(f"--tau {how['tau']:g} and --end {how['end']:g} do not fit: tau must be below end, and end at most 1")
    names = (c.source, c.target) if c.input else [state["domains"][d] for d in main_domains(state["domains"], c.source, c.target)]
    if translator:
        way = "its student, 1 evaluation an image"
    else:
        start = "directly" if how["x0"] == "image" else f"tau {how['tau']:g}"
        way = f"{start}, guidance {how['guidance']:g}, {how['steps']} {how['solver']} steps a leg, {evaluations(how)} evaluations an image"
    print(f"{' -> '.join(names)} on {device} with the EMA weights of step {state['step']}: {way}", flush=True)
    if files and translator and c.source == c.target:
        print("source and target are one domain: the student leaves such images as they are", flush=True)
    if files:
        return translate_files(files, model, translator, state, c, how, device)
    return translate_heads(model, translator, state, c, how, device)


def evaluations(how):
    """Network evaluations of one translation."""
    leg = sampler.EVALUATIONS[how["solver"]](how["steps"])
    return leg * (1 if how["guidance"] == 1 else 2) + leg * (how["x0"] == "noise")


if __name__ == "__main__":
    run(main)
