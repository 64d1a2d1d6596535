"""What a folder of images is: which of its folders are domains, which are splits, which are patients."""

import os
import re
import unicodedata
import zlib
from collections import Counter, namedtuple
from pathlib import Path

from minimedshift.support import dicom
from minimedshift.support.command import refuse
from minimedshift.support.images import FORMATS

SPLITS = "train", "valid", "test"
WORDS = "(training|train|validation|valid|val|testing|test)"
SPLIT = re.compile(f"{WORDS}([ _-]?(set|data|images))?", re.I)
BOTH = re.compile(f"(?i:{WORDS})(?:[ _-](.+)|([A-Z].*))|(.+)[ _-](?i:{WORDS})")  # trainA, train_A, a_test
# what lies beside images, as a folder or as a part of a file's name
OTHER = re.compile(r"(.*[ ._-])?(\w*mask|seg|segmentation|label|overlay|annotation|thumb|thumbnail|preview)s?"
                   r"(t[rs])?\d*([ _-].*)?|__macosx", re.I)
ENDINGS = re.compile(f"({'|'.join(map(re.escape, FORMATS))}|[.]dcm)+$", re.I)  # x.dcm.png is made of x.dcm
NAMED = re.compile(r"(?:(.*?\d[^ _-]*)[ _-])?")  # 00000013_005.png, patient7_view1.png: of one patient
# group: a patient: a domain's first folders that differ, or by DICOM or names; name: what pairs share
File = namedtuple("File", "path domain split group name")


def image_files(root):
    """The images (Paths, sorted) in a folder and below, and {what else is there: how many}.
    A link to a folder is followed, unless it leads back to a folder that it lies in."""
    found, left = {}, Counter()  # found: real path -> path

    def walk(folder, above):
        for path in sorted(folder.iterdir(), key=lambda path: (path.is_symlink(), path)):
            ending = path.suffix.lower()
            if path.name.startswith(".") or path.is_dir() and path.resolve() in above:
                continue
            ours = any((path / name).exists() for name in ("checkpoint.pt", ".lock"))  # false for a file
            if path.is_dir() and (ours or OTHER.fullmatch(path.name)):
                left[f"folder {path.name}"] += 1
            elif path.is_dir():
                walk(path, {*above, path.resolve()})
            elif not path.exists():
                left["broken links"] += 1
            elif OTHER.fullmatch(path.stem):
                left["masks, thumbnails and the like"] += 1
            elif path.resolve() in found:
                left["links to images that are there"] += 1
            elif ending in FORMATS or dicom.pydicom and dicom.is_dicom(path):
                found[path.resolve()] = path
            else:
                what = "DICOM (pip install pydicom)" if dicom.is_dicom(path) else ending or "nameless"
                left[f"{what} files"] += 1

    walk(Path(root), {Path(root).resolve()})
    return sorted(found.values()), left


def place(root, path, joined=True):
    """The File at a path: the first folder that is no split is its domain, those below are its group.
    joined: whether a split and a domain may be one name."""
    folders = [unicodedata.normalize("NFC", part) for part in path.relative_to(root).parts[:-1]]
    both = joined and folders and not SPLIT.fullmatch(folders[0]) and BOTH.fullmatch(folders[0])
    folders = [*filter(None, both.groups()), *folders[1:]] if both else folders
    domain = next((part for part in folders if not SPLIT.fullmatch(part)), "")
    own = re.compile(f"({SPLIT.pattern})[ _-]?({re.escape(domain)})?", re.I)  # CT/train_ct is CT/train
    splits = {split for split in SPLITS for part in folders
              if own.fullmatch(part) and part[:2].lower() == split[:2]}
    rest = [part for part in folders if not own.fullmatch(part)][1:]
    refuse(len(splits) > 1 or splits and not domain,
           f"--data: is {path} to train or to test on, and in which domain? No folder says it, or two do")
    stem = unicodedata.normalize("NFC", ENDINGS.sub("", path.name))
    return File(path, domain, "".join(splits), "/".join(rest), "/".join([*rest, stem]))


def grouped(files):
    """The Files of a domain, whose groups are now the first folder in which they differ: what is below it, as
    a patient's studies, belongs together. DICOM files name the patient themselves. Without folders the start
    of names counts, if there are five or more."""
    folders = [file.group.split("/") for file in files]
    same = len(os.path.commonprefix(folders))
    start = re.match("(.*[ _-])?", os.path.commonprefix([file.path.name for file in files])).end()
    names = [NAMED.match(file.path.name, start)[1] or "" for file in files]  # study1_p003_1.png: p003
    if len({*names}) < 5:
        names = [""] * len(files)
    return [file._replace(group=dicom.patient(file.path) or [*parts[same:], name][0])
            for file, parts, name in zip(files, folders, names)]


def find_files(root, seed):
    """The domains of a folder, {"train-0": Files of the first, "valid-0", "test-0", "train-1": ...}, whether
    its user made the split (else a tenth is held out by `seed`), and what is not read.
    Raises UserError, asking back, for what cannot be understood."""
    refuse(not Path(root).is_dir(), f"--data {root}: there is no such folder")
    paths, left = image_files(root)
    tops = [BOTH.fullmatch(path.relative_to(root).parts[0]) for path in paths]
    joined = any(top and (top[1] or top[5] or "").lower().startswith("train") for top in tops)
    files = [place(root, path, joined) for path in paths]
    left["images outside the domains' folders"] = sum(not file.domain for file in files)
    files = [file for file in files if file.domain]
    domains, splits, result = sorted({file.domain for file in files}), {file.split for file in files}, {}
    refuse(len(domains) < 2, f"--data {root}: two or more sub-folders with images are needed, one a domain, "
                             f"found: {', '.join(domains) or 'none'}{unread(left)}")
    starts = {part[:4].lower() for domain in domains for part in re.split("[ _-]", domain)}
    refuse({"trai", "test"} <= starts, f"--data {root}: are {', '.join(domains)} splits? Name them "
                                       "train/DOMAIN and test/DOMAIN")
    for d, domain in enumerate(domains):
        own = grouped([file for file in files if file.domain == domain])
        refuse("train" in splits and any(not file.split for file in own),
               f"--data {root}: {domain} has images outside a folder train: sort them into it, or away")
        train, valid, test = ([f for f in own if (f.split or "train") == split] for split in SPLITS)
        refuse(not train, f"--data {root}: {domain} has no images to train on")
        if "test" not in splits:
            valid, test = test, valid
        result |= {f"train-{d}": train, f"valid-{d}": valid, f"test-{d}": test}
    own_split = bool(splits & {"valid", "test"})
    return tuple(domains), result if own_split else hold_out(result, seed), own_split, left


def hold_out(files, seed):
    """{"train-0": Files, ...} with about a tenth of each domain moved to "test-0" and so on, of five at least
    one. A group is on one side, in all domains: those in many come first. One that is more than what is still
    to be moved stays, unless it is the smallest."""
    whose = lambda file: file.group or file.name
    counts = {key: Counter(map(whose, some)) for key, some in files.items() if key.startswith("train")}
    wanted = {key: len(files[key]) // 10 or int(len(files[key]) >= 5) for key in counts}
    least = {key: min(count.values()) for key, count in counts.items()}
    spread = Counter(group for count in counts.values() for group in count)  # in how many domains a group is
    code = lambda group: zlib.crc32(f"{seed} {group}".encode(errors="surrogateescape"))  # any bytes
    chosen, split = set(), dict(files)
    for group in sorted(spread, key=lambda group: (-spread[group], code(group))):
        sizes = {key: count[group] for key, count in counts.items() if group in count}
        if all(0 < wanted[key] and n <= max(wanted[key], least[key]) < len(files[key])
               for key, n in sizes.items()):
            chosen.add(group)
            for key, n in sizes.items():
                wanted[key] -= n
    for key in counts:
        split[key] = [file for file in files[key] if whose(file) not in chosen]
        split[key.replace("train", "test")] = [file for file in files[key] if whose(file) in chosen]
    return split


def people(domains, files, own_split):
    """What is said of groups of files, who should be patients, a line each. own_split: the user made it."""
    notes, counts, trained, tested = [], [], set(), set()
    for d, domain in enumerate(domains):
        train, valid, test = (files[f"{split}-{d}"] for split in SPLITS)
        kept, out = ({file.group for file in some} - {""} for some in (train, valid + test))
        trained, tested = trained | kept, tested | out
        own = train + valid + test
        counts.append(f"{domain} {len({file.group or file.name for file in own})}")
        if twins := len(own) - len({(file.split, file.name) for file in own}):
            notes.append(f"warning: {twins} images of {domain} differ from others by the ending of "
                         "their name alone: are they there twice?")
        if not own_split and len(kept | out) < 10 and (out or len(kept) > 1):
            notes.append(f"warning: {domain} has the groups {', '.join(sorted(kept | out))}, of which "
                         f"{' and '.join(sorted(out)) or 'none'} is held out whole: are they patients?")
    if own_split and len(trained) >= 5 and trained & tested:  # fewer are no patients
        notes.append(f"warning: if {min(trained & tested)} is a patient, it is both to train and to test on")
    return [*notes, f"patients, by folders, DICOM or names: {', '.join(counts)}"]


def unread(left):
    """What is not read, in words."""
    return "; not read: " * any(left.values()) + ", ".join(f"{n} {what}" for what, n in left.items() if n)
