"""Translate X-ray images: `python translate.py INPUT OUTPUT --source DOMAIN --target DOMAIN`.

INPUT is an image or a folder of images, with its sub-folders. OUTPUT gets the same names, sizes and depths.
The student translates; --method flow, or a flag such as --tau, takes the flow. Without arguments, held-out
simulated heads become a figure beside the checkpoint. An image is translated at the size of the training
images; the change is then carried to full resolution (sizes.py), so that its fine detail stays."""

import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from minimedshift import classify, evaluate, sampler
from minimedshift.folder import image_files, unread
from minimedshift.methods import main_domains
from minimedshift.model import load_model
from minimedshift.phantom import sets
from minimedshift.sizes import carry_to_full_size, resize, working_shape
from minimedshift.student import restore
from minimedshift.support import images
from minimedshift.support.command import UserError, flag, parse, refuse, run
from minimedshift.support.files import explain_os_error
from minimedshift.support.log import progress
from minimedshift.support.machine import in_batches, keep_memory, pick_device

HOW = "flow (default: as the checkpoint says)"
FLOW = ("tau", "guidance", "steps", "solver")  # flags that the student has no use for
PIXELS = 12e6  # of large images that are held at once


@dataclass(frozen=True)
class Config:
    input: str = flag(None, "an image, or a folder of images", "positional")
    output: str = flag(None, "the translation: a file for a file, a folder for a folder", "positional")
    source: str = flag(None, "domain of INPUT, or auto: inferred for each image", "what")
    target: str = flag(None, "domain to translate to", "what")
    checkpoint: str = flag("out/checkpoint.pt", "trained network; its EMA weights are used", "what")
    method: str = flag(None, "default: the student, unless a flag is the flow's", "what", ("student", "flow"))
    seed: int = flag(0, "of the student's noise, and of the noise by which --source auto looks", "what")
    tau: float = flag(None, "how far back: 1 keeps structure, 0 favours realism", HOW, low=0, below=1)
    guidance: float = flag(None, "its scale on the way forward; 1: none", HOW, above=-1000, below=1000)
    steps: int = flag(None, "solver steps of each leg", HOW, low=1, high=1000)
    solver: str = flag(None, "ODE solver", HOW, choices=tuple(sampler.SOLVERS))
    bits: int = flag(0, "of a grey level in 16-bit files (0: as in training)", "files", low=0, high=16)
    overwrite: bool = flag(False, "replace existing files", "files")
    skip_existing: bool = flag(False, "go on: leave out what OUTPUT has already", "files")
    compare: str = flag(None, "also draw: source | translation | difference, of the first 8 images", "files")
    batch_size: int = flag(0, "most images at once (0: 16 on a CPU, 256 on a GPU)", "machine", low=0)
    device: str = flag("auto", "where to compute: cuda, cuda:1, mps, cpu", "machine")


def check_flags(c, state, how, flow_flags):
    """Raises UserError for flags that do not go together, or not with the checkpoint."""
    net, domains = c.checkpoint, list(state["domains"])
    if c.input:
        refuse(not (c.output and c.source and c.target),
               "to translate INPUT, give OUTPUT, --source (a domain, or auto) and --target too")
    else:
        own = state["config"].get("data")
        refuse(own, f"{net} knows your own images: give INPUT, OUTPUT, --source and --target")
        refuse(c.source == "auto", "--source auto needs INPUT: the domain of held-out heads is known")
        refuse(c.compare, "--compare needs INPUT and OUTPUT")
    for name, value, allowed in (("source", c.source, [*domains, "auto"]), ("target", c.target, domains)):
        refuse(value not in (None, *allowed),
               f"--{name} {value} is not a domain of {net}: choose from {', '.join(allowed)}")
    if c.method == "student":
        refuse(flow_flags, f"--{' --'.join(flow_flags)} is a flag of the flow, of no use to the student")
        refuse(not state.get("student"), f"{net} has no student: `python train.py --resume` teaches one")
    t_image = how["t_image"]
    refuse(how["tau"] >= t_image, f"--tau {how['tau']:g} must be below {t_image:g}, the t given to an image")


def plan_files(c):
    """[(input file, output file)]; makes the folders. Raises UserError for a file that cannot be written."""
    source, target, endings = Path(c.input), Path(c.output), " ".join(images.FORMATS)
    refuse(not source.exists(), f"INPUT {source}: there is no such file or folder")
    files = [(source, target)]
    if source.is_dir():
        refuse(target.is_file(), f"INPUT {source} is a folder but OUTPUT {target} is a file")
        refuse(source.resolve() in target.resolve().parents,
               f"OUTPUT {target} lies inside INPUT {source}: choose a folder outside")
        found, left = image_files(source)
        known = lambda path: path.suffix.lower() in images.FORMATS  # else it is DICOM
        png = lambda path: path if known(path) else f"{path}".removesuffix(".dcm") + ".png"
        files = [(path, target / png(path.relative_to(source))) for path in found]
        refuse(not files, f"INPUT {source} has no image files ({endings}){unread(left)}")
        print(f"INPUT: {len(files)} images{unread(left)}")
    if c.skip_existing:
        files = [pair for pair in files if not pair[1].exists()]
    outputs = [path for _, path in files]
    refuse(len(set(outputs)) < len(outputs), f"INPUT {source} has a DICOM file and an image of one name")
    if c.compare:
        taken = {path.resolve() for pair in files for path in pair}
        refuse(Path(c.compare).resolve() in taken, f"{c.compare} is also an image: choose another name")
        outputs.append(Path(c.compare))
    for path in outputs:
        refuse(path.is_dir(), f"{path} is a folder: name the file that is to be written")
        refuse(path.suffix.lower() not in images.FORMATS, f"{path}: an image ends in {endings}")
        refuse(path.exists() and not (c.overwrite or c.skip_existing),
               f"{path} would be replaced: choose another name, or say --overwrite or --skip-existing")
        with explain_os_error(f"the folder {path.parent}", "cannot be made"):
            path.parent.mkdir(parents=True, exist_ok=True)
    return files


def find_readings(c, state):
    """How files of the source are read, and those of the target written: with the levels of the source."""
    known = {name: images.Reading(**how) for name, how in state["image"].get("readings", {}).items()}
    own = [how for name, how in known.items() if c.source in (name, "auto")] or [images.Reading()]
    refuse(len(set(own)) > 1, "--source auto needs domains that are read alike, and these are not: name it")
    other = own[0].low or own[0].mode == "F"
    refuse(c.bits and other, f"--bits {c.bits}: {c.source} has levels {own[0].low:g} to {own[0].high:g}")
    reading = replace(own[0], high=2.0**c.bits - 1) if c.bits else own[0]
    return reading, replace(reading, invert=known[c.target].invert) if known else reading


def batches(files, reading, shape_of, most, bad):
    """Lists of up to `most` (input, output, x, info) of one working shape; unreadable inputs go to `bad`."""
    waiting = {}
    for source, path in files:
        try:
            x, info = images.read_image(source, reading)
            images.check_writable(path, info)
            if info.mode == "I;16" and not reading.high:
                print(f"{source}: read as {info.bits} bits")
        except UserError as error:
            if len(files) == 1:
                raise
            bad.append(source)
            print(f"error: {error}", file=sys.stderr)
            continue
        shape = shape_of(*info.size)
        waiting.setdefault(shape, []).append((source, path, x, info))
        held = sum(x.numel() for batch in waiting.values() for _, _, x, _ in batch)
        if len(waiting[shape]) == most or held > PIXELS:
            yield waiting.pop(shape)
    yield from waiting.values()


def translate_files(files, translate, model, state, c, device):
    """Translate all files, those of one working shape together. Returns the exit status."""
    shape_of = partial(working_shape, size=state["image"]["size"], stride=model.stride)
    most = c.batch_size or (256 if device.type == "cuda" else 16)
    bad, rows, names, done, start = [], [], [], 0, time.time()
    reading, writing = find_readings(c, state)
    target = state["domains"].index(c.target)
    for batch in batches(files, reading, shape_of, most, bad):
        sources, paths, full, infos = zip(*batch)
        full = [images.channels_to(x, state["image"]["channels"])[None] for x in full]  # on a CPU
        shape = shape_of(*infos[0].size)
        x1 = torch.cat([resize(x.to(device), shape) for x in full])
        y_source = classify.source_labels(x1, sources, model, state, c.source, c.seed)
        translate_some = lambda i: translate(x1[i], y_source[i], target)
        out = in_batches(translate_some, torch.arange(len(x1), device=device), len(x1))
        refuse(out.isnan().any(), f"{c.checkpoint} translates to what is no number: its weights are spoilt")
        for source, path, large, info, small, new in zip(sources, paths, full, infos, x1, out):
            new = carry_to_full_size(large.to(device), small[None], new[None])[0]
            images.write_image(path, new, info, writing)
            if c.compare and len(rows) < 8:
                both = torch.stack([large[0], new.clamp(-1, 1).cpu()])  # a large one in small
                scale = min(1, 640 / max(both.shape[-2:]))
                before, after = resize(both, tuple(max(1, round(n * scale)) for n in both.shape[-2:]))
                rows.append((before, after, (after - before) / 2))
                names.append(str(source)[-24:])
        done += len(batch)
        progress(done, len(files) - len(bad), start, "translating")
    if rows:
        images.figure(c.compare, rows, ["source", "translation", "difference / 2\n(grey: none)"], names)
    if c.skip_existing:
        print(f"{len(files)} images were left to translate; the others were there already")
    if bad:
        print(f"{len(bad)} of {len(files)} images could not be read; the others are done", file=sys.stderr)
    return 2 if bad else 0


def main(argv=None):
    c = parse(Config, __doc__, argv)
    device = pick_device(c.device)
    keep_memory()
    model, state = load_model(c.checkpoint, device)
    flow_flags = [name for name in FLOW if getattr(c, name) is not None]
    how = state["translate"] | {name: getattr(c, name) for name in flow_flags}
    check_flags(c, state, how, flow_flags)
    files = plan_files(c) if c.input else []
    domains, config = state["domains"], state["config"]
    if not c.input:
        s, t = main_domains(domains, c.source, c.target)
        c = replace(c, source=domains[s], target=domains[t])
    if c.method == "student" or (c.method is None and state.get("student") and not flow_flags):
        student = translate = partial(restore(state["student"], device, c.checkpoint), seed=c.seed)
        way = "its student, 1 evaluation"
    else:
        student, translate = None, partial(sampler.translate, model, **how)
        legs = f"guidance {how['guidance']:g}, {how['steps']} {how['solver']} steps a leg"
        count = sampler.evaluations(how["solver"], how["steps"], how["guidance"])
        way = f"tau {how['tau']:g}, {legs}, {count} evaluations"
    print(f"{c.source} -> {c.target} on {device} with EMA weights of step {state['step']}: {way} an image")
    if c.input:
        return translate_files(files, translate, model, state, c, device)
    pairs = sets.paired_heads(state["image"]["size"], config["test_heads"], "test", config["seed"])
    path, taus = Path(c.checkpoint).parent / "translate.png", None if c.tau is None else (c.tau,)
    evaluate.picture(path, model, student, how, pairs, domains, s, t, device, taus)
    print(f"{path}: simulated test heads, with their mean structure PSNR against the simulated truth")
    return 0


if __name__ == "__main__":
    run(main)
