"""Execute the example notebook in a kernel: progress is visible, and the labels come out."""

from __future__ import annotations

import base64
import re
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

NOTEBOOK = Path(__file__).parents[2] / "examples" / "adapt_from_a_folder.ipynb"
BARS = (
    *("train the APIs", "run: survey", "run: first distillation", "run: choose pictures"),
    "run: joint distillation",
)


def bars_of(notebook: Any) -> list[str]:
    """Return the final state of each bar, such as "run: survey: 100%".

    With ipywidgets a bar is a widget, whose state is in the metadata of the notebook, and the cell
    shows a view of it. Otherwise it is text on stderr.
    """
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    views = "application/vnd.jupyter.widget-view+json"
    if any(views in output.get("data", {}) for output in outputs):
        state = notebook.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"]
        texts = [str(model["state"].get("value")) for model in state.values()]
    else:
        stderr = "".join(o["text"] for o in outputs if o.get("name") == "stderr")
        texts = re.split(r"[\r\n]", stderr)
    plain = (" ".join(text.split()) for text in texts)  # tqdm fills widgets with wide blanks
    return [found[0] for text in plain if (found := re.match(r"[\w: ]+: 100%", text))]


def test_the_notebook_shows_progress_and_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    for name, value in (("TMPDIR", str(tmp_path)), ("OMP_NUM_THREADS", "1")):
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()  # raises if a cell fails
    assert set(bars_of(notebook)) == {f"{bar}: 100%" for bar in BARS}

    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    text = "".join(output["text"] for output in outputs if output.get("name") == "stdout")
    assert "classes: A B D F G\n" in text
    labels = re.findall(r"^labels: (.*)$", text, re.MULTILINE)[0].split()
    assert len(labels) == 30 and set(labels) <= set("ABDFG")
    right = sum(label == wanted for label, wanted in zip(labels, sorted(6 * "ABDFG"), strict=True))
    assert f"accuracy on 30 new pictures: {right / 30:.2f}\n" in text
    assert right > 12  # a guess gets 6 on average, and more than 12 in 3 of 1,000 cases
    (picture,) = [o["data"]["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    image = Image.open(BytesIO(base64.b64decode(picture)))
    assert image.width > 300 and len(image.getcolors(100_000) or ()) > 100
    assert list(tmp_path.glob("bidfmkd-*/classifier.safetensors"))


def test_the_notebook_is_kept_small_and_without_outputs() -> None:
    content = NOTEBOOK.read_text(encoding="utf-8")
    assert len(content) < 100_000 and '"outputs": []' in content
    assert not re.search(r'"outputs": \[\s*\{', content) and '"execution_count": 1' not in content
