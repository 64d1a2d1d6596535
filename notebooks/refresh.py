"""Run notebooks from top to bottom and keep their outputs: python notebooks/refresh.py [NAME.ipynb ...]"""

import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent


def execute(path, seconds=600):
    """The notebook at `path`, run in a fresh kernel from its own folder. Raises CellExecutionError on any error."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=seconds, kernel_name="python3",
                   resources={"metadata": {"path": str(HERE)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of each cell: they change with every run
        for output in cell.get("outputs", []):
            output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
    notebook.metadata.pop("widgets", None)  # their state is large, and made anew by a run
    return notebook


def main(names):
    for path in [HERE / name for name in names] or sorted(HERE.glob("*.ipynb")):
        start = time.time()
        nbformat.write(execute(path), path)
        print(f"{path.name}: {time.time() - start:.0f} s, {path.stat().st_size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
