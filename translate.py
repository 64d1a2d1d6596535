"""Translate X-ray images: `python translate.py INPUT OUTPUT --source DOMAIN --target DOMAIN`.

INPUT is an image or a folder of them, with its sub-folders. OUTPUT gets the same names, sizes, modes and bit
depths; a network trained on grey images makes colours grey. --source auto infers the domain of each image.
The checkpoint's student translates, in one evaluation; --method flow, or a flag of the flow such as --tau,
takes the flow. Without arguments, held-out simulated heads become a figure beside the checkpoint.

An image is translated at the size of the training images: its shorter side is brought to it. The change is
then carried to full resolution (support/sizes.py), so that the image's own fine detail stays.
"""

import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from minimedshift import sampler, student
from minimedshift import metrics
from minimedshift.methods import TAUS, main_domains
from minimedshift.phantom import sets
from minimedshift import classify
from minimedshift.support import film, images
from minimedshift.support.sizes import carry, resize, working_shape
from minimedshift.support.checkpoint import load_model
from minimedshift.support.command import UserError, flag, parse, refuse, run
from minimedshift.support.files import clear_unfinished, explain_os_error
from minimedshift.support.log import progress
from minimedshift.support.machine import can_compile, in_batches, keep_memory, pick_device

HOW = "flow (default: as the checkpoint says)"


@dataclass(frozen=True)
class Config:
    input: str = flag(None, "an image, or a folder of images", "positional")
    output: str = flag(None, "the translation: a file for a file, a folder for a folder", "positional")
    source: str = flag(None, "domain of INPUT, or auto: inferred for each image", "what")
    target: str = flag(None, "domain to translate to", "what")
    checkpoint: str = flag("out/checkpoint.pt", "trained network; its EMA weights are used", "what")
    method: str = flag(None, "who translates (default: the student, if there is one and no flag of the flow)",
                       "what", choices=("student", "flow"))
    seed: int = flag(0, "of all noise: the student's, --source auto's, --solver sde's", "what")
    tau: float = flag(None, "how far back to go, below end: near 1 keeps structure, near 0 favours realism",
                      HOW, kind=float, low=0, below=1)
    guidance: float = flag(None, "strength of the target label on the way forward; 1 is none",
                           HOW, kind=float, above=-1000, below=1000)
    steps: int = flag(None, "solver steps of each leg", HOW, kind=int, low=1, high=1000)
    solver: str = flag(None, "ODE solver, or sde: a diffusion with the same images at every t",
                       HOW, choices=tuple(sampler.SOLVERS))
    end: float = flag(None, "time t assigned to an image", HOW, kind=float, above=0, high=1)
    overwrite: bool = flag(False, "replace existing files", "files")
    compare: str = flag(None, "also draw: source | translation | difference, of the first 8 images", "files")
    trajectory: str = flag(None, "also draw: the first 8 images on their way to tau and up again", "files")
    uncertainty: str = flag(None, "also draw: where --samples translations differ; no error map", "files")
    samples: int = flag(None, "translations of an image behind --uncertainty (default: 8)", "files",
                        kind=int, low=2, high=1000)
    batch_size: int = flag(0, "images at once (0: 16 on a CPU, 256 on a GPU), fewer where memory is short",
                           "machine", low=0)
    device: str = flag("auto", "where to compute", "machine", choices=("auto", "cuda", "mps", "cpu"))


FLOW = ("tau", "guidance", "steps", "solver", "end", "trajectory", "uncertainty")  # of no use to the student
PICTURES = ("compare", "trajectory", "uncertainty")
HEADS = 8  # translated without arguments


# ---------------------------------------------------------------- flags and files, checked before any work

def check_flags(c, state, how, flow_flags):
    """Raises UserError for flags that do not go together, or not with the checkpoint."""
    net, config, domains = c.checkpoint, state["config"], list(state["domains"])
    direct = how["x0"] == "image"  # from image to image: such a network has seen no noise
    has_score = state["shape"]["score"] or (config["coupling"] == "independent" and config["sigma"] == 0)
    if c.input:
        refuse(not (c.output and c.source and c.target),
               "to translate INPUT, give OUTPUT, --source (a domain, or auto) and --target too")
    else:
        refuse(config.get("data"), f"{net} knows your own images: give INPUT, OUTPUT, --source and --target")
        refuse(c.source == "auto", "--source auto needs INPUT: the domain of held-out heads is known")
        for name in PICTURES:
            refuse(getattr(c, name), f"--{name} needs INPUT and OUTPUT")
    for name, value, allowed in (("source", c.source, [*domains, "auto"]), ("target", c.target, domains)):
        refuse(value not in (None, *allowed),
               f"--{name} {value} is not a domain of {net}: choose from {', '.join(allowed)}")
    if c.method == "student":
        refuse(flow_flags, f"--{' --'.join(flow_flags)} is a flag of the flow, of no use to the student")
        refuse(not state.get("student"), f"{net} has no student: `python train.py --resume` teaches one")
    for name, used in (("tau", c.tau), ("end", c.end), ("source auto", c.source == "auto" or None)):
        refuse(direct and used is not None, f"--{name} has no meaning for {net}, trained with --x0 image")
    refuse(how["tau"] >= how["end"], f"tau, here {how['tau']:g}, must be below end, {how['end']:g}")
    refuse(c.solver == "sde" and (direct or not has_score),
           "--solver sde needs a score: train with --score, or with --coupling independent and --sigma 0")
    refuse(c.uncertainty and (direct or config["sigma"]),
           f"--uncertainty needs a network trained from noise with --sigma 0, and {net} is not")
    refuse(c.samples and not c.uncertainty, "--samples needs --uncertainty FILE, which is drawn from them")


def plan_files(c):
    """[(input file, output file)], folders made. Raises UserError for what cannot be written, or is there."""
    source, target, endings = Path(c.input), Path(c.output), " ".join(images.FORMATS)
    refuse(not source.exists(), f"INPUT {source}: there is no such file or folder")
    files = [(source, target)]
    if source.is_dir():
        refuse(target.is_file(), f"INPUT {source} is a folder but OUTPUT {target} is a file")
        refuse(source.resolve() in target.resolve().parents,
               f"OUTPUT {target} lies inside INPUT {source}: choose a folder outside")
        files = [(path, target / path.relative_to(source)) for path in images.image_files(source)]
        refuse(not files, f"INPUT {source} has no image files ({endings})")
    outputs = [path for _, path in files]
    taken = {path.resolve() for pair in files for path in pair}
    for picture in [Path(getattr(c, name)) for name in PICTURES if getattr(c, name)]:
        refuse(picture.resolve() in taken, f"{picture} is also another picture or image: choose another name")
        taken.add(picture.resolve())
        outputs.append(picture)
    for path in outputs:
        refuse(path.is_dir(), f"{path} is a folder: name the file that is to be written")
        refuse(path.suffix.lower() not in images.FORMATS, f"{path}: an image ends in {endings}")
        refuse(path.exists() and not c.overwrite,
               f"{path} would be replaced: choose another name, or say --overwrite")
    for folder in {path.parent for path in outputs}:
        with explain_os_error(f"the folder {folder}", "cannot be made"):
            folder.mkdir(parents=True, exist_ok=True)
        clear_unfinished(folder)
    return files


# ---------------------------------------------------------------- files -> batches -> images

def batches(files, shape_of, most, bad):
    """Lists of up to `most` (input, output, x, info) of one working shape; unreadable inputs go to `bad`."""
    waiting = {}
    for source, path in files:
        try:
            x, info = images.read_image(source)
            images.check_writable(path, info)
        except UserError as error:
            if len(files) == 1:
                raise
            bad.append(source)
            print(f"error: {error}", file=sys.stderr)
            continue
        shape = shape_of(*info.size)
        waiting.setdefault(shape, []).append((source, path, x, info))
        if len(waiting[shape]) == most:
            yield waiting.pop(shape)
    yield from waiting.values()


def translate_files(files, translate, model, state, c, how, device):
    """Translate all files, those of one working shape together; returns the exit status."""
    shape_of = partial(working_shape, size=state["image"]["size"], stride=model.stride)
    most = c.batch_size or (256 if device.type == "cuda" else 16)
    pictures = film.Pictures(c, model, how, state["domains"])
    above = Path(c.input) if Path(c.input).is_dir() else Path(c.input).parent
    bad, done, start = [], 0, time.time()
    for batch in batches(files, shape_of, most, bad):
        full = [images.channels_to(x, state["image"]["channels"])[None] for _, _, x, _ in batch]  # on a CPU
        shape = shape_of(*full[0].shape[-2:])
        x1 = torch.cat([resize(x.to(device), shape) for x in full])
        y_source = classify.sources(x1, [path for path, *_ in batch], model, state, c.source, c.target, c.seed)
        y_target = torch.full_like(y_source, state["domains"].index(c.target))
        translate_some = lambda i: translate(x1[i], y_source[i], y_target[i])
        out = in_batches(translate_some, torch.arange(len(x1), device=device), len(x1))
        refuse(out.isnan().any(), f"{c.checkpoint} translates to what is no number: its weights are spoilt")
        changed = []
        for (source, path, _, info), large, small, new in zip(batch, full, x1, out):
            if large.shape[-2:] != shape:
                new = carry(large.to(device), small[None], new[None])[0]
            images.write_image(path, new, info)
            changed.append((str(source.relative_to(above)), large[0], new.clamp(-1, 1).cpu()))
        pictures.add(changed, x1, y_source, y_target, out)
        done += len(batch)
        progress(done, len(files) - len(bad), start, "translating")
    pictures.write()
    if bad:
        print(f"{len(bad)} of {len(files)} images could not be read; the others are done", file=sys.stderr)
    return 2 if bad else 0


def translate_heads(flow, pupil, state, c, how, device):
    """Write translate.png beside the checkpoint: source | translations | simulated truth, of test heads."""
    size, config = state["image"]["size"], state["config"]
    test = sets.paired_heads(size, config["test_heads"], "test", config["seed"], decoys=sets.DECOYS)
    column = sets.phantom.DOMAINS.index
    to_float = lambda array, name: torch.from_numpy(array[:HEADS, column(name)].astype("float32")).to(device)
    x1, truth = to_float(test.images, c.source), to_float(test.truth, c.target)
    labels = [state["domains"].index(name) for name in (c.source, c.target)]
    pictures = {c.source: x1}
    if how["x0"] == "image":
        pictures["directly"] = flow(x1, *labels)
    elif c.method != "student":
        taus = {*TAUS, how["tau"]} if c.tau is None else {c.tau}
        for tau in sorted(tau for tau in taus if tau < how["end"]):
            pictures[f"tau {tau:g}"] = flow(x1, *labels, tau=tau)
    if pupil:
        pictures["student"] = pupil(x1, *labels)
    captions = [f"{name}\n{metrics.structure(x, truth).mean():.1f} dB" for name, x in pictures.items()]
    columns = [x.cpu() for x in (*pictures.values(), truth)]
    path = Path(c.checkpoint).parent / "translate.png"
    images.figure(path, list(zip(*columns)), [*captions, f"{c.target}\nsimulated truth"], [""] * len(x1))
    print(f"{path}: simulated test heads, with their mean structure PSNR against the simulated truth")
    return 0


def main(argv=None):
    c = parse(Config, __doc__, argv)
    device = pick_device(c.device)
    keep_memory()
    model, state = load_model(c.checkpoint, device)
    given = {name: value for name, value in vars(c).items() if value is not None}
    how = {name: given.get(name, default) for name, default in state["translate"].items()}
    flow_flags = [name for name in FLOW if name in given]
    check_flags(c, state, how, flow_flags)
    files = plan_files(c) if c.input else []
    if not files:
        s, t = main_domains(state["domains"], c.source, c.target)
        c = replace(c, source=state["domains"][s], target=state["domains"][t])

    def flow(x1, y_source, y_target, **change):
        draw = torch.Generator(device).manual_seed(c.seed)
        return sampler.translate(model, x1, y_source, y_target, **(how | change), generator=draw)

    pupil, way = None, "its student, 1 evaluation"
    if c.method == "student" or (c.method is None and state.get("student") and not flow_flags):
        pupil = partial(student.restore(state["student"], device, c.checkpoint), seed=c.seed)
    else:
        way = "directly" if how["x0"] == "image" else f"tau {how['tau']:g}"
        way += f", guidance {how['guidance']:g}, {how['steps']} {how['solver']} steps a leg, "
        way += f"{sampler.evaluations(how['solver'], how['steps'], how['guidance'], how['x0'])} evaluations"
    weights = f"the EMA weights of step {state['step']}"
    print(f"{c.source} -> {c.target} on {device} with {weights}: {way} an image", flush=True)
    if not files:
        return translate_heads(flow, pupil, state, c, how, device)
    if can_compile(device) and len(files) >= 100:  # fewer are done sooner without
        model.compile_blocks(dynamic=True)
    return translate_files(files, pupil or flow, model, state, c, how, device)


if __name__ == "__main__":
    run(main)
