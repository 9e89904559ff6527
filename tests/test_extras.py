"""A base install: what runs without the extras, and the sentence of each part that needs one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from qwen_rerank import extras
from qwen_rerank.extras import EXTRAS, pip_line

ROOT = Path(__file__).resolve().parents[1]
NO_PART = {"all", "dev", "docs", "faiss-cpu", "faiss-gpu", "mteb", "ray"}  # `doctor` tells of FAISS by itself

# What somebody types without any extra: the feature that is named, the package that brings it, and the extra.
LACKING = {
    "from qwen_rerank import QwenScorer": ("QwenScorer", "torch", "local"),
    "from qwen_rerank import load_scorer; load_scorer('Qwen/Qwen3-Reranker-0.6B')": ("QwenScorer", "torch", "local"),
    "import qwen_rerank.scorers.cross_encoder.torch_backend": (
        "CrossEncoderScorer with safetensors weights",
        "transformers",
        "transformers",
    ),
    "import qwen_rerank.check.reference": ("a reference model", "transformers", "transformers"),
    "from qwen_rerank import load_embedder; load_embedder('a/model')": (
        "SentenceTransformerEmbedder",
        "sentence-transformers",
        "dense",
    ),
    "from qwen_rerank.store.faiss_build import load_faiss; load_faiss()": ("FaissStore", "faiss-cpu", "faiss-cpu"),
    "import qwen_rerank.langchain": ("qwen_rerank.langchain", "langchain-core", "langchain"),
    "import qwen_rerank.llama_index": ("qwen_rerank.llama_index", "llama-index-core", "llama-index"),
    "import qwen_rerank.serve.app": ("qwen_rerank.serve", "fastapi", "serve"),
    "from qwen_rerank import HttpScorer": ("HttpScorer", "pydantic-core", "client"),
    "import qwen_rerank.evaluation.measures": ("qwen_rerank.evaluation", "ir-measures", "eval"),
    "import qwen_rerank.evaluation.significance": ("qwen_rerank.evaluation", "scipy", "eval"),
    "import qwen_rerank.evaluation.calibrate": ("qwen_rerank.evaluation.calibrate", "scikit-learn", "eval"),
    "import qwen_rerank.evaluation.plots": ("qwen_rerank.evaluation.plots", "matplotlib", "eval"),
    "import qwen_rerank.evaluation.hub": ("load_hub", "datasets", "hub"),
    "from qwen_rerank.folders.office import html_sections; html_sections('a')": (
        "reading HTML",
        "selectolax",
        "files",
    ),
    "import qwen_rerank.bulk": ("qwen_rerank.bulk", "pyarrow", "bulk"),
    "import qwen_rerank.mcp_server": ("qwen_rerank.mcp_server", "mcp", "mcp"),
    "from qwen_rerank.evaluation.mteb import _meta; _meta('a', 'b')": ("qwen_rerank.evaluation.mteb", "mteb", "mteb"),
    "from qwen_rerank.training import train_reranker": ("train_reranker", "sentence-transformers", "train"),
    "from qwen_rerank.training import train_embedder": ("train_embedder", "sentence-transformers", "train"),
    "import qwen_rerank.training.losses": ("Training", "sentence-transformers", "train"),
}

BARE = """
import json, sys
from importlib.abc import MetaPathFinder

class Absent(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
said = {{}}
for statement in json.loads(sys.argv[1]):
    try:
        exec(statement, {{}})
    except ImportError as error:
        said[statement] = f"{{type(error).__name__}}: {{error}}"
print(json.dumps(said))
"""


def requirements() -> dict[str, set[str]]:
    """Return each extra's packages, those of the extras that it names included."""
    data = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found: dict[str, set[str]] = {}

    def packages(extra: str) -> set[str]:
        names: set[str] = set()
        for line in data["optional-dependencies"][extra]:
            inner = re.fullmatch(r"qwen-rerank\[(.+)\]", line)
            names |= set().union(*map(packages, inner[1].split(","))) if inner else {re.split(r"[\[<>=]", line)[0]}
        return names

    for extra in data["optional-dependencies"]:
        found[extra] = packages(extra)
    return found


def without_extras(statements: list[str]) -> dict[str, str]:
    """Return what Python says to each statement where no optional package can be imported."""
    modules = {"scikit-learn": "sklearn", "llama-index-core": "llama_index", "faiss-cpu": "faiss"}
    optional = {name for extra in set(requirements()) - {"dev"} for name in requirements()[extra]}
    absent = {modules.get(name, name.replace("-", "_")) for name in optional}
    # Also what came along with them.
    absent |= {"starlette", "pydantic", "pandas", "pyarrow", "httpx"}
    code = BARE.format(absent=absent)
    done = subprocess.run([sys.executable, "-c", code, json.dumps(statements)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answers: dict[str, str] = json.loads(done.stdout)
    return answers


def test_every_missing_part_is_one_sentence_with_its_pip_line():
    said = without_extras(list(LACKING))

    assert {statement: message.partition(" (")[0] for statement, message in said.items()} == {
        statement: f"MissingExtraError: {feature} needs `{package}`: {pip_line(extra)}"
        for statement, (feature, package, extra) in LACKING.items()
    }
    with_a_way_out = [message for message in said.values() if "; without it: the small model" in message]
    assert [message.split()[1] for message in with_a_way_out] == [
        "QwenScorer",
        "QwenScorer",
        "SentenceTransformerEmbedder",
    ]


def test_every_extra_has_a_part_that_asks_for_it_and_brings_what_is_asked_for():
    asked = {(package, extra) for _, package, extra in LACKING.values()}

    assert {extra for _, extra in asked} >= set(EXTRAS)
    assert [pair for pair in asked if pair[0] not in requirements()[pair[1]]] == []


def test_without_extras_the_base_works():
    statements = [
        "import qwen_rerank, qwen_rerank.cli, qwen_rerank.check, qwen_rerank.training, qwen_rerank.testing",
        "from qwen_rerank import Calibration, Cascade, CrossEncoderScorer, Document, Reranker, TwoStageRetriever",
        "import qwen_rerank.scorers.cross_encoder.onnx_backend",
        "from qwen_rerank import FaissStore, load_embedder; load_embedder('pocket').embed_queries(['a'])",
        "from qwen_rerank.samples import load_sample; load_sample('en')",
        "from qwen_rerank.evaluation.collection import Collection",
    ]

    assert without_extras(statements) == {}


def test_the_table_is_what_the_extras_bring():
    assert {extra: set(packages) for extra, packages in EXTRAS.items()} == {
        extra: packages for extra, packages in requirements().items() if extra not in NO_PART
    }


def test_all_has_every_extra_that_can_be_installed_together():
    everything = requirements()["all"]

    assert [name for name, packages in requirements().items() if not packages <= everything] == [
        "faiss-gpu",
        "mteb",
        "ray",
        "docs",
        "dev",
    ]


def test_an_installed_package_is_named_and_a_checkout_by_its_place(monkeypatch, tmp_path):
    monkeypatch.setattr(extras, "_PARENT", tmp_path / "site-packages")
    assert pip_line("local") == "pip install 'qwen-rerank[local]'"

    monkeypatch.setattr(extras, "_PARENT", tmp_path / "a clone" / "src")
    (tmp_path / "a clone").mkdir()
    (tmp_path / "a clone" / "pyproject.toml").touch()
    assert pip_line("local") == f"pip install -e '{tmp_path}/a clone[local]'"


def test_every_extra_that_is_named_somewhere_exists():
    places = [*(ROOT / "examples").glob("*.py"), *ROOT.glob("*.md"), *(ROOT / "eval").rglob("*.py")]
    places += [ROOT / "Makefile", ROOT / "Dockerfile", *(ROOT / "src/qwen_rerank/help").glob("*.md")]
    lists = [
        found for place in places for found in re.findall(r"(?:qwen-rerank|\.)\[([a-z][\w,-]+)\]", place.read_text())
    ]

    assert len(lists) > 10
    assert {name for names in lists for name in names.split(",")} <= set(requirements())
