"""The notebooks run from top to bottom, hold their outputs, are small, and show the code as it is today."""

import sys
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
sys.path.insert(0, str(FOLDER))


def code_cells(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def test_there_are_seven():
    assert [path.name[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05", "06", "07"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stored_and_small_and_cells_are_short(path):
    assert path.stat().st_size <= 600_000
    cells = code_cells(path)
    assert all(cell.execution_count for cell in cells) and any(cell.outputs for cell in cells)
    assert max(len(cell.source.splitlines()) for cell in cells) <= 25
    errors = [out for cell in cells for out in cell.outputs if out.output_type == "error"]
    assert not errors


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_source_that_is_shown_is_todays(path):
    import lesson
    outputs = [out for cell in code_cells(path) for out in cell.outputs]
    shown = [out.metadata["shown"] for out in outputs if out.get("metadata", {}).get("shown")]
    assert shown, "a notebook shows the package's own code"
    for one in shown:
        today = lesson.hash_of(lesson.find(one["name"]))
        assert today == one["hash"], f"{path.name} shows old code: {one['name']}"


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_from_top_to_bottom(path):
    import refresh
    refresh.execute(path)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_files_are_loaded_as_weights_only(path):
    for cell in code_cells(path):
        assert cell.source.count("torch.load(") == cell.source.count("weights_only=True"), cell.source
