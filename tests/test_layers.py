"""The package's layers, read from its imports: every module imports from lower layers, or from its own room."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import qwen_rerank

ROOT = Path(qwen_rerank.__file__).parent

# A room is one module or folder; several names for one room stand together.
LAYERS: list[list[set[str]]] = [
    [
        {
            "types",
            "protocols",
            "errors",
            "extras",
            "checks",
            "bounded_json",
            "regular_files",
            "deprecation",
            "tokenizer",
            "sharing",
        }
    ],
    [
        {"prompt"},
        {"packing"},
        {"passages"},
        {"calibration"},
        {"documents", "files"},
        {"filters"},
        {"fusion"},
        {"words"},
        {"models"},
        {"samples"},
        {"help"},
    ],
    [{"scorers", "scorers.base"}],
    [
        {"scorers.qwen"},
        {"scorers.cross_encoder"},
        {"scorers.http"},
        {"embedders"},
        {"store"},
        {"lexical"},
        {"testing"},
    ],
    [{"scorers.adapted", "scorers.cached", "scorers.score_cache", "scorers.loading", "scorers.pool"}, {"folders"}],
    [{"reranker"}],
    [{"pipeline"}],
    [
        {
            "adapters",
            "descriptions",
            "langchain",
            "llama_index",
            "langchain_store",
            "llama_index_store",
            "vector_stores",
        },
        {"serve"},
        {"check"},
        {"evaluation"},
        {"bulk"},
        {"training"},
        {"mcp_server"},
        {"capacity"},
    ],
    [{"cli"}],
]
HEAVY = ("torch", "faiss", "transformers", "langchain", "llama_index", "sentence_transformers")


def place(module: str) -> tuple[int, int]:
    """Return layer and room of a dotted module name; the longest matching room wins."""
    found = [
        (len(name), layer, number)
        for layer, rooms in enumerate(LAYERS)
        for number, room in enumerate(rooms)
        for name in room
        if module == name or module.startswith(name + ".")
    ]
    assert found, f"qwen_rerank.{module} has no layer; give it one in {Path(__file__).name}"
    return max(found)[1:]


def modules() -> dict[str, Path]:
    """Return every module below the package by dotted name; a folder stands for its `__init__`."""
    names = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        if name and name != "__main__":
            names[name] = path
    return names


def imported(path: Path, known: dict[str, Path]) -> set[str]:
    """Return the package's own modules that a file imports, at its top or inside a function."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("qwen_rerank.") for alias in node.names if "qwen_rerank." in alias.name}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "qwen_rerank":
                homes = {alias.name: qwen_rerank._HOMES.get(alias.name, alias.name) for alias in node.names}
                found |= {home.removeprefix("qwen_rerank.") for home in homes.values()} & set(known)
            elif node.module and node.module.startswith("qwen_rerank."):
                found.add(node.module.removeprefix("qwen_rerank."))
    return found


def test_modules_import_only_from_lower_layers():
    known = modules()
    wrong = []
    for name, path in known.items():
        layer, room = place(name)
        for other in sorted(imported(path, known)):
            other_layer, other_room = place(other)
            if other_layer > layer or (other_layer == layer and other_room != room):
                wrong.append(f"{name} (layer {layer}) imports {other} (layer {other_layer})")
    assert wrong == []


def test_a_module_that_breaks_the_layers_would_be_noticed(tmp_path):
    """The reading itself works: each form of import is seen."""
    path = tmp_path / "x.py"
    forms = (
        "import qwen_rerank.store.errors",
        "from qwen_rerank.reranker import Reranker",
        "def f():\n    from qwen_rerank import Cascade, prompt, __version__",
    )
    path.write_text("\n".join(forms))
    assert imported(path, modules()) == {"store.errors", "reranker", "pipeline", "prompt"}
    assert place("store.errors") < place("reranker") < place("pipeline")
    assert place("scorers.qwen.checkpoint")[0] == place("scorers.http")[0]
    assert place("scorers.qwen.checkpoint") != place("scorers.http")


def loaded_by(statement: str) -> set[str]:
    """Return the heavy packages that a fresh interpreter has after a statement."""
    code = f"{statement}\nimport sys\nprint(*sorted(set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name for name in done.stdout.split() if name.partition(".")[0].startswith(HEAVY)}


@pytest.mark.parametrize(
    "statement",
    [
        "import qwen_rerank",
        "from qwen_rerank import Document, Candidate, RankedDocument, Scorer, RerankError, Reranker, TwoStageRetriever",
        "import qwen_rerank.prompt, qwen_rerank.passages, qwen_rerank.calibration",
        "import qwen_rerank.cli",
        "from qwen_rerank import CrossEncoderScorer; import qwen_rerank.scorers.cross_encoder.onnx_backend",
    ],
)
def test_importing_loads_nothing_heavy(statement):
    assert loaded_by(statement) == set()
